"""Start in the middle: the lower modules of a model stand still and hidden states enter above them.

For the length of a block, instances get a `forward` of their own in `__dict__`, which call look-up reads before the
class; the class and the model's code stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.speed.cut import Cut
from smidgen.speed.listen import Trace

_ABSENT = object()


@dataclass(frozen=True, eq=False)
class Seam:
    """What stands in for the lower modules.

    Attributes:
        blanks: module before the stack -> (width, dtype) of what it gives; it is looked at for nothing but its shape.
        extra: per lower block, the number of empty places behind the hidden states in its output; None for a tensor.
    """

    cut: Cut
    blanks: dict[nn.Module, tuple[int, torch.dtype]]
    extra: tuple[int | None, ...]

    @classmethod
    def of(cls, cut: Cut, seen: Trace) -> Seam:
        """Found out from one forward pass. Raises TrainError if the blocks are not a plain chain."""
        outputs = [(module, output) for module, output in seen.calls if module in cut.blocks]
        if [module for module, _ in outputs] != list(cut.blocks):
            raise cut.refusal("its blocks do not run one after another, once each")
        if seen.entered != tuple(seen.states.shape):
            raise cut.refusal(f"the shape of the hidden states changes below {cut.stack}.{cut.index}")
        return cls(cut, _blanks(cut, seen), tuple(_extra(cut, output) for _, output in outputs[: cut.index]))


@contextmanager
def feeding(seam: Seam, hidden: Tensor) -> Iterator[None]:
    """Inside, a forward pass starts at the first edited block with `hidden` (B, T, d); all is restored on exit."""
    forwards: dict[nn.Module, Callable[..., Any]] = {
        module: partial(give_blank, (*hidden.shape[:2], width), dtype, hidden.device)
        for module, (width, dtype) in seam.blanks.items()
    }
    for block, extra in zip(seam.cut.lower, seam.extra, strict=True):
        forwards[block] = partial(give_hidden, hidden, extra)
    own = {module: module.__dict__.get("forward", _ABSENT) for module in forwards}
    first, handle = seam.cut.first, None
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        if first is not None:  # something may stand between the blocks
            handle = first.register_forward_pre_hook(partial(put_in, hidden), with_kwargs=True, prepend=True)
        yield
    finally:
        if handle is not None:
            handle.remove()
        for module, forward in own.items():
            if forward is _ABSENT:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def give_blank(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *args: Any, **kwargs: Any) -> Tensor:
    """Stands in for an embedding: zeros of the right shape, without a look at the inputs."""
    return torch.zeros(shape, dtype=dtype, device=device)


def give_hidden(hidden: Tensor, extra: int | None, *args: Any, **kwargs: Any) -> Any:
    """Stands in for a lower block."""
    return hidden if extra is None else (hidden, *[None] * extra)


def put_in(hidden: Tensor, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the first edited block: its hidden states are `hidden`."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _blanks(cut: Cut, seen: Trace) -> dict[nn.Module, tuple[int, torch.dtype]]:
    """Modules that are called before the first block only, and give a (B or 1, T, n) tensor."""
    start = next(i for i, (module, _) in enumerate(seen.calls) if module is cut.blocks[0])
    later = {module for module, _ in seen.calls[start:]}
    rows, tokens = seen.states.shape[:2]
    found: dict[nn.Module, tuple[int, torch.dtype]] = {}
    for module, output in seen.calls[:start]:
        hidden_like = isinstance(output, Tensor) and output.is_floating_point() and output.ndim == 3
        if module not in later and hidden_like and output.shape[0] in (1, rows) and output.shape[1] == tokens:
            found[module] = (output.shape[2], output.dtype)
    return found


def _extra(cut: Cut, output: Any) -> int | None:
    """What a block hands on beside its hidden states is left empty; if it mattered, the check of logits shows it."""
    if isinstance(output, Tensor):
        return None
    if not isinstance(output, tuple):
        raise cut.refusal(f"its blocks give a {type(output).__name__}, neither a tensor nor a tuple")
    return len(output) - 1
