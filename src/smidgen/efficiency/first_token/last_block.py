"""Only the rows that are read: where the head reads the first token, the last block is computed for it alone.

Query, attention output, feed-forward and norms are those of one token. The block is called with one row; its attention
sees all tokens, either by keys and values that the projections make of them, or, where these are frozen and attention
reads what they make as it is, without keys and values (see `query`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smidgen.common.errors import TrainError
from smidgen.common.hook_types import Args, Kwargs, first_of, like
from smidgen.efficiency.first_token.single_query_attention import Maps, attend_once, check_unchanged
from smidgen.efficiency.prefix_cache.cut_point import irregular
from smidgen.efficiency.prefix_cache.equivalence_check import check_logits
from smidgen.efficiency.prefix_cache.recorded_pass import Batch, entering, in_eval_mode, result_of
from smidgen.planning.site_rules import rules_of
from smidgen.ports.attachment_record import attachment, is_attached
from smidgen.sites.discovery import find_blocks, find_sites
from smidgen.sites.site import LinearSite

_BROKEN = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)


@dataclass(frozen=True, eq=False)
class FirstRow:
    """How the last block of a model is computed for the first token alone.

    Attributes:
        block: the last block.
        projections: its maps to keys and values.
        norm: what stands between the block's input and them; None if nothing does.
        maps: what makes their keys and values needless; None if these are made.
    """

    block: nn.Module
    projections: tuple[nn.Module, ...]
    norm: nn.Module | None
    maps: Maps | None = None

    @classmethod
    def of(cls, model: nn.Module, batch: Batch) -> FirstRow:
        """Found out, and checked, from forward passes over a few examples.

        Raises:
            TrainError: the head reads more than the first token, or the block cannot be computed so.
        """
        why = irregular(model)
        if why is not None:
            raise TrainError(why)
        places = attachment(model).plan.places if is_attached(model) else ()
        if reading := [site for site in places if not rules_of(site).keeps_tokens]:
            raise TrainError(f"what is attached at {reading[0].name} reads the hidden states of all tokens")
        blocks = next(iter(find_blocks(model).values()))
        if getattr(blocks[-1], "gradient_checkpointing", False):
            raise TrainError(f"{type(blocks[-1]).__name__} is computed a second time in the backward pass")
        with in_eval_mode(model):
            wanted = result_of(model(**batch))[0]
            _reads_first(model, blocks[-1], batch, wanted)
            found = _found(model, len(blocks) - 1, blocks[-1], batch)
            if found.maps is not None:
                with suppress(TrainError):
                    return found._checked(model, batch, wanted)
            return replace(found, maps=None)._checked(model, batch, wanted)

    def _checked(self, model: nn.Module, batch: Batch, wanted: Tensor) -> FirstRow:
        try:
            with self.reading():
                result = result_of(model(**batch))[0]
        except _BROKEN as error:
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise TrainError(f"{type(self.block).__name__} cannot be computed for one token ({said})") from error
        check_logits(result, wanted, f"{type(self.block).__name__}: logits from one row")
        return self

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, a forward pass computes one row of the last block; all is restored on exit."""
        call = _Call(self.norm, self.maps)
        handles = [
            self.block.register_forward_pre_hook(call.enter, with_kwargs=True),
            self.block.register_forward_hook(call.leave, always_call=True),
        ]
        for module in self.projections:
            if self.maps is None:
                handles.append(module.register_forward_pre_hook(call.widen, prepend=True))
            else:
                handles.append(module.register_forward_hook(call.note))
        try:
            yield
        finally:
            call.leave()
            for handle in handles:
                handle.remove()


@dataclass(eq=False)
class _Call:
    """One call of the block: all rows of its input, and those that keys and values are made of.

    The mode is on for the length of the call alone, as each function of torch takes a way through it.
    """

    norm: nn.Module | None
    maps: Maps | None
    rows: Tensor | None = None
    inputs: Tensor | None = field(default=None, init=False)
    made: list[Tensor] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.attention = _Attention(self)

    def enter(self, block: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        self.rows, self.inputs = _hidden(args, kwargs), None
        self.made.clear()
        self.attention.__enter__()
        first = self.rows[:, :1].contiguous()
        return ((first, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": first})

    def leave(self, *args: object) -> None:
        if self.rows is not None:
            self.attention.__exit__(None, None, None)
        self.rows = self.inputs = None
        self.made.clear()

    def normed(self) -> Tensor:
        """(B, T, d), what keys and values are made of."""
        assert self.rows is not None
        if self.inputs is None:
            self.inputs = self.rows if self.norm is None else self.norm(self.rows)
        return self.inputs

    def widen(self, projection: nn.Module, args: Args) -> Args:
        """Pre-hook of a projection: all rows enter."""
        return (self.normed(), *args[1:])

    def note(self, projection: nn.Module, args: Args, output: Tensor) -> None:
        """Hook of a projection that stays with one row."""
        self.made.append(output)


class _Attention(TorchFunctionMode):
    """Attention of the row to all tokens; keys of T tokens, if any, were taken for one token with T times the heads."""

    def __init__(self, call: _Call) -> None:
        super().__init__()
        self.call = call

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),  # those of func
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or self.call.rows is None:
            return func(*args, **kwargs)
        if self.call.maps is None:
            return attend_once(self.call.rows.shape[1], *args, **kwargs)
        check_unchanged(self.call.made, *args[1:3])
        return self.call.maps.attend(self.call.normed(), args[0], *args[3:], **kwargs)


def _hidden(args: Args, kwargs: Kwargs) -> Tensor:
    states = entering(args, kwargs)
    if not isinstance(states, Tensor):
        raise TypeError("no hidden states enter it")
    return states


def _reads_first(model: nn.Module, block: nn.Module, batch: Batch, wanted: Tensor) -> None:
    """Spoil all other rows that leave the last block: nothing may come of it."""

    def spoil(module: nn.Module, args: Args, output: object) -> object:
        first, rest = first_of(output)
        states = first.clone()
        if states.ndim != 3 or states.shape[1] < 2:
            raise TrainError("examples of one token have no rows to leave out")
        states[:, 1:] = float("nan")
        return like(output, states, rest)

    handle = block.register_forward_hook(spoil)
    try:
        result = result_of(model(**batch))[0]
    finally:
        handle.remove()
    if not torch.equal(result, wanted):
        raise TrainError("the head reads more than the first token")


def _found(model: nn.Module, layer: int, block: nn.Module, batch: Batch) -> FirstRow:
    """How the last block makes keys and values of all rows, the rest of the first alone; from one recorded pass."""
    linear = (site for site in find_sites(model) if isinstance(site, LinearSite))
    wide = [s for s in linear if s.layer == layer and {"key", "value"} & set(s.roles)]
    name = type(block).__name__
    if any(site.rows is not None for site in wide) or {r for s in wide for r in s.roles} < {"key", "value"}:
        raise TrainError(f"{name} has no maps of their own to keys and to values")
    projections = tuple(model.get_submodule(path) for path in dict.fromkeys(site.path for site in wide))
    key, value = (next(s.path for s in wide if role in s.roles) for role in ("key", "value"))
    maps = Maps.of(model.get_submodule(key), model.get_submodule(value))
    start, inputs, made = _inputs(model, block, projections, batch)
    sources = {id(x): x for x in inputs}
    if len(inputs) != len(projections) or len(sources) != 1:
        raise TrainError(f"keys and values of {name} are not made of the same rows, once each")
    source = inputs[0]
    if source is start:
        return FirstRow(block, projections, None, maps)
    for module, given, output in made:
        if output is source and given is start:
            return FirstRow(block, projections, module, maps)
    raise TrainError(f"more than a norm stands between what enters {name} and its keys")


def _inputs(
    model: nn.Module, block: nn.Module, projections: tuple[nn.Module, ...], batch: Batch
) -> tuple[object, list[object], list[tuple[nn.Module, object, object]]]:
    """What enters the block, what enters the projections, and (module, input, output) of the modules of the block."""
    starts: list[object] = []
    inputs: list[object] = []
    made: list[tuple[nn.Module, object, object]] = []

    def enter(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        starts.append(entering(args, kwargs))

    def take(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        inputs.append(entering(args, kwargs))

    def end(module: nn.Module, args: Args, kwargs: Kwargs, output: object) -> None:
        made.append((module, entering(args, kwargs), output))

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [p.register_forward_pre_hook(take, with_kwargs=True, prepend=True) for p in projections]
    handles += [m.register_forward_hook(end, with_kwargs=True) for m in list(block.modules())[1:]]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return starts[0] if len(starts) == 1 else None, inputs, made
