"""Run a model and listen at the cut: what enters there, and how the model gets there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from smidgen.common.hook_types import Args, Kwargs
from smidgen.common.module_modes import evaluating
from smidgen.efficiency.prefix_cache.cut_point import Cut

Batch = dict[str, Tensor]


class ReachedError(Exception):
    """Ends a forward pass at the cut."""


@dataclass(frozen=True)
class Trace:
    """One whole forward pass in eval mode.

    Attributes:
        states: (B, T, d), what crosses the cut.
        entered: shape of what entered the first block.
        result: the model's logits, or its first output.
        loss: the model's own, if the batch has labels.
        precision: dtype in which it was computed.
        calls: modules before the stack, blocks and `cut.inner` with their outputs, in order.
    """

    states: Tensor
    entered: tuple[int, ...]
    result: Tensor
    loss: Tensor | None
    precision: torch.dtype
    calls: list[tuple[nn.Module, object]]


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradient inside; every module's mode restored."""
    with evaluating(model), torch.no_grad():
        yield


def states_at(cut: Cut, batch: Batch) -> Tensor:
    """What crosses the cut, (B, T, d); nothing behind it is computed.

    Raises:
        TrainError: the forward pass does not come to the cut, or no such tensor crosses it.
    """
    seen: list[object] = []
    with _listening(cut, partial(_stop, seen)), suppress(ReachedError):
        cut.model(**batch)
    return _checked(cut, seen)


def trace(cut: Cut, batch: Batch) -> Trace:
    """A whole forward pass.

    Raises:
        TrainError: the forward pass does not come to the cut, or no (B, T, d) tensor crosses it.
    """
    crossing: list[object] = []
    precisions: list[torch.dtype] = []
    shapes: list[tuple[int, ...]] = []
    calls: list[tuple[nn.Module, object]] = []

    def see(states: object) -> None:
        crossing.append(states)
        precisions.append(_precision(states))

    def enter(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        shapes.append(tuple(getattr(entering(args, kwargs), "shape", ())))

    def left(module: nn.Module, args: Args, output: object) -> None:
        calls.append((module, output))

    handles = [module.register_forward_hook(left) for module in (*cut.before(), *cut.blocks, *cut.inner)]
    handles.append(cut.blocks[0].register_forward_pre_hook(enter, with_kwargs=True))
    try:
        with _listening(cut, see):
            result, loss = result_of(cut.model(**batch))
    finally:
        for handle in handles:
            handle.remove()
    states = _checked(cut, crossing)
    return Trace(states, (shapes or [()])[0], result, loss, precisions[0], calls)


def result_of(output: object) -> tuple[Tensor, Tensor | None]:
    """A model's logits, or its first output, and its loss if it has computed one."""
    if isinstance(output, Tensor):
        return output, None
    loss: Tensor | None = getattr(output, "loss", None)
    return output.logits if hasattr(output, "logits") else cast("Sequence[Tensor]", output)[0], loss


def entering(args: Args, kwargs: Kwargs) -> object:
    """The hidden states among the arguments of a module."""
    return args[0] if args else kwargs.get("hidden_states")


@contextmanager
def _listening(cut: Cut, see: Callable[[object], None]) -> Iterator[None]:
    if cut.entry is not None:
        handle = cut.entry.register_forward_pre_hook(partial(_at_first, see), with_kwargs=True, prepend=True)
    else:
        handle = cut.blocks[-1].register_forward_hook(partial(_at_last, see), prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _at_first(see: Callable[[object], None], block: nn.Module, args: Args, kwargs: Kwargs) -> None:
    see(entering(args, kwargs))


def _at_last(see: Callable[[object], None], block: nn.Module, args: Args, output: object) -> None:
    see(output[0] if isinstance(output, tuple) else output)


def _stop(seen: list[object], states: object) -> None:
    seen.append(states)
    raise ReachedError


def _precision(states: object) -> torch.dtype:
    kind = states.device.type if isinstance(states, Tensor) else "cpu"
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return states.dtype if isinstance(states, Tensor) else torch.float32


def _checked(cut: Cut, seen: list[object]) -> Tensor:
    if len(seen) != 1:
        raise cut.refusal(f"a forward pass comes to {cut.place} {len(seen)} times")
    states = seen[0]
    if not isinstance(states, Tensor) or states.ndim != 3 or not states.is_floating_point():
        raise cut.refusal(f"what crosses the cut at {cut.place} is no (batch, tokens, width) tensor")
    return states
