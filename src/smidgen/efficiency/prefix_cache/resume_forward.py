"""Start in the middle: the lower modules of a model stand still and hidden states enter above them.

For the length of a block, instances get a `forward` of their own in `__dict__`, which call look-up reads before the
class; the class and the model's code stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from smidgen.common.hook_types import Args, Kwargs
from smidgen.efficiency.prefix_cache.cut_point import Cut
from smidgen.efficiency.prefix_cache.recorded_pass import Trace

Output = Tensor | tuple[Tensor | None, ...]
_ABSENT = object()


@dataclass(frozen=True)
class Blank:
    """What stands in for an output that is looked at for nothing but its shape: zeros (B, T, width).

    Attributes:
        extra: number of empty places behind them in a tuple; None for a tensor alone.
    """

    width: int
    dtype: torch.dtype
    extra: int | None = None

    def like(self, hidden: Tensor, length: int) -> Output:
        """Zeros (B, length, width) on the device of `hidden` (B, T, d)."""
        zeros = hidden.new_zeros((hidden.shape[0], length, self.width), dtype=self.dtype)
        return zeros if self.extra is None else (zeros, *[None] * self.extra)


@dataclass(frozen=True, eq=False)
class Seam:
    """What stands in for the lower modules.

    Attributes:
        before: modules before the stack -> what they give.
        extra: per lower block, the number of empty places behind the hidden states in its output; None for a tensor.
        inner: modules of the first edited block that stand still -> what they give.
    """

    cut: Cut
    before: Mapping[nn.Module, Blank]
    extra: tuple[int | None, ...]
    inner: Mapping[nn.Module, Blank]

    @classmethod
    def of(cls, cut: Cut, seen: Trace) -> Seam:
        """Found out from one forward pass. Raises TrainError if the blocks are not a plain chain."""
        outputs = [(module, output) for module, output in seen.calls if module in cut.blocks]
        if [module for module, _ in outputs] != list(cut.blocks):
            raise cut.refusal("its blocks do not run one after another, once each")
        if seen.entered[:2] != tuple(seen.states.shape[:2]):
            raise cut.refusal(f"the shape of the hidden states changes below {cut.place}")
        extra = tuple(_extra(cut, output) for _, output in outputs[: cut.index])
        inner = {module: _blank(cut, output) for module, output in seen.calls if module in cut.inner}
        return cls(cut, _before(cut, seen), extra, inner)


@contextmanager
def feeding(seam: Seam, hidden: Tensor, length: int | None = None) -> Iterator[None]:
    """Inside, a forward pass starts at the cut with `hidden` (B, T, d); all is restored on exit.

    Args:
        length: tokens of the batch; T unless only the first tokens' states enter.
    """
    tokens = hidden.shape[1]
    forwards: dict[nn.Module, Callable[..., Output]] = {
        module: partial(give_blank, blank, hidden, length or tokens) for module, blank in seam.before.items()
    }
    forwards |= {module: partial(give_blank, blank, hidden, tokens) for module, blank in seam.inner.items()}
    for block, extra in zip(seam.cut.lower, seam.extra, strict=True):
        forwards[block] = partial(give_hidden, hidden, extra)
    own = {module: module.__dict__.get("forward", _ABSENT) for module in forwards}
    entry, handles = seam.cut.entry, []
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        if entry is not None:
            handles.append(entry.register_forward_pre_hook(partial(put_in, hidden), with_kwargs=True, prepend=True))
        if seam.cut.first is not None and entry is not seam.cut.first:  # it adds what it was given to nothing
            first_block = partial(put_in, hidden)
            handles.append(seam.cut.first.register_forward_pre_hook(first_block, with_kwargs=True, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, forward in own.items():
            if forward is _ABSENT:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def give_blank(blank: Blank, hidden: Tensor, length: int, *args: object, **kwargs: object) -> Output:
    """Stands in for a module whose output means nothing, without a look at the inputs."""
    return blank.like(hidden, length)


def give_hidden(hidden: Tensor, extra: int | None, *args: object, **kwargs: object) -> Output:
    """Stands in for a lower block."""
    return hidden if extra is None else (hidden, *[None] * extra)


def put_in(hidden: Tensor, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Forward pre-hook of a block or a site: its hidden states are `hidden`."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _before(cut: Cut, seen: Trace) -> dict[nn.Module, Blank]:
    """Modules that are called before the first block only, and give a (B or 1, T, n) tensor."""
    start = next(i for i, (module, _) in enumerate(seen.calls) if module is cut.blocks[0])
    later = {module for module, _ in seen.calls[start:]}
    rows, tokens = seen.states.shape[:2]
    found: dict[nn.Module, Blank] = {}
    for module, output in seen.calls[:start]:
        if module in later or not isinstance(output, Tensor):
            continue
        hidden_like = output.is_floating_point() and output.ndim == 3
        if hidden_like and output.shape[0] in (1, rows) and output.shape[1] == tokens:
            found[module] = Blank(output.shape[2], output.dtype)
    return found


def _blank(cut: Cut, output: object) -> Blank:
    states = output[0] if isinstance(output, tuple) else output
    if not isinstance(states, Tensor) or states.ndim != 3:
        raise cut.refusal(f"a module in front of {cut.place} gives no (batch, tokens, width) tensor")
    return Blank(states.shape[2], states.dtype, _extra(cut, output))


def _extra(cut: Cut, output: object) -> int | None:
    """What a block hands on beside its hidden states is left empty; if it mattered, the check of logits shows it."""
    if isinstance(output, Tensor):
        return None
    if not isinstance(output, tuple):
        raise cut.refusal(f"its blocks give a {type(output).__name__}, neither a tensor nor a tuple")
    return len(output) - 1
