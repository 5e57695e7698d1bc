"""Only the rows that are read: where the head reads the first token, the last block is computed for it alone.

Keys and values are those of all tokens; query, attention output, feed-forward and norms are those of one. The block is
called with one row, and the projections of keys and values with all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smidgen.errors import TrainError
from smidgen.sites import find_blocks, find_sites
from smidgen.speed.cut import irregular
from smidgen.speed.listen import Batch, entering, resting, result_of
from smidgen.speed.trial import check_logits

_BROKEN = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)


@dataclass(frozen=True, eq=False)
class FirstRow:
    """How the last block of a model is computed for the first token alone.

    Attributes:
        block: the last block.
        projections: its maps to keys and values.
        norm: what stands between the block's input and them; None if nothing does.
    """

    block: nn.Module
    projections: tuple[nn.Module, ...]
    norm: nn.Module | None

    @classmethod
    def of(cls, model: nn.Module, batch: Batch) -> FirstRow:
        """Found out, and checked, from forward passes over a few examples.

        Raises:
            TrainError: the head reads more than the first token, or the block cannot be computed so.
        """
        why = irregular(model)
        if why is not None:
            raise TrainError(why)
        blocks = next(iter(find_blocks(model).values()))
        if getattr(blocks[-1], "gradient_checkpointing", False):
            raise TrainError(f"{type(blocks[-1]).__name__} is computed a second time in the backward pass")
        with resting(model):
            wanted = result_of(model(**batch))[0]
            _reads_first(model, blocks[-1], batch, wanted)
            found = _found(model, len(blocks) - 1, blocks[-1], batch)
            found._check(model, batch, wanted)
        return found

    def _check(self, model: nn.Module, batch: Batch, wanted: Tensor) -> None:
        try:
            with self.reading():
                result = result_of(model(**batch))[0]
        except _BROKEN as error:
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise TrainError(f"{type(self.block).__name__} cannot be computed for one token ({said})") from error
        check_logits(result, wanted, f"{type(self.block).__name__}: logits from one row")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, a forward pass computes one row of the last block; all is restored on exit."""
        call = _Call(self.norm)
        handles = [
            self.block.register_forward_pre_hook(call.enter, with_kwargs=True),
            self.block.register_forward_hook(call.leave, always_call=True),
            *(p.register_forward_pre_hook(call.widen, prepend=True) for p in self.projections),
        ]
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
    rows: Tensor | None = None
    inputs: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.heads = _Heads(self)

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.rows, self.inputs = entering(args, kwargs), None
        self.heads.__enter__()
        first = self.rows[:, :1].contiguous()
        return ((first, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": first})

    def leave(self, *args: Any) -> None:
        if self.rows is not None:
            self.heads.__exit__(None, None, None)
        self.rows = self.inputs = None

    def widen(self, projection: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.inputs is None:
            self.inputs = self.rows if self.norm is None else self.norm(self.rows)
        return (self.inputs, *args[1:])


class _Heads(TorchFunctionMode):
    """Keys and values of T tokens were taken for one token with T times the heads: give them their shape back."""

    def __init__(self, call: _Call) -> None:
        super().__init__()
        self.call = call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or self.call.rows is None:
            return func(*args, **kwargs)
        return _attend(self.call.rows.shape[1], *args, **kwargs)


def _attend(
    tokens: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **rest: Any,
) -> Tensor:
    """Attention of one query per head (B, H, 1, n) to keys and values (B, T * H, 1, n): (B, H, 1, n).

    Written as sums over (B, T, H, n): as products of matrices, each would be one row.
    """
    if query.shape[2] != 1 or key.shape[2] != 1 or key.shape[1] != tokens * query.shape[1] or is_causal:
        raise TrainError("attention does not get the keys of one row")
    shape = (query.shape[0], tokens, *query.shape[1::2])
    wide = torch.promote_types(query.dtype, torch.float32)
    scaled = query.transpose(1, 2) * (scale or query.shape[-1] ** -0.5)  # (B, 1, H, n)
    scores = (key.reshape(shape) * scaled).sum(-1, dtype=wide).transpose(1, 2)  # (B, H, T)
    if attn_mask is not None:
        mask = attn_mask[..., 0, :]
        lowest = torch.finfo(wide).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    share = F.dropout(torch.softmax(scores, -1), dropout_p).transpose(1, 2)[..., None]  # (B, T, H, 1)
    return (share.to(value.dtype) * value.reshape(shape)).sum(1, dtype=wide).to(value.dtype)[:, :, None]


def _reads_first(model: nn.Module, block: nn.Module, batch: Batch, wanted: Tensor) -> None:
    """Spoil all other rows that leave the last block: nothing may come of it."""

    def spoil(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        states = (output[0] if isinstance(output, tuple) else output).clone()
        if states.ndim != 3 or states.shape[1] < 2:
            raise TrainError("examples of one token have no rows to leave out")
        states[:, 1:] = float("nan")
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = block.register_forward_hook(spoil)
    try:
        result = result_of(model(**batch))[0]
    finally:
        handle.remove()
    if not torch.equal(result, wanted):
        raise TrainError("the head reads more than the first token")


def _found(model: nn.Module, layer: int, block: nn.Module, batch: Batch) -> FirstRow:
    wide = [s for s in find_sites(model) if s.layer == layer and {"key", "value"} & set(s.roles) and s.kind == "linear"]
    name = type(block).__name__
    if any(site.rows is not None for site in wide) or {r for s in wide for r in s.roles} < {"key", "value"}:
        raise TrainError(f"{name} has no maps of their own to keys and to values")
    projections = tuple(model.get_submodule(path) for path in dict.fromkeys(site.path for site in wide))
    start, inputs, made = _inputs(model, block, projections, batch)
    sources = {id(x): x for x in inputs}
    if len(inputs) != len(projections) or len(sources) != 1:
        raise TrainError(f"keys and values of {name} are not made of the same rows, once each")
    source = inputs[0]
    if source is start:
        return FirstRow(block, projections, None)
    for module, given, output in made:
        if output is source and given is start:
            return FirstRow(block, projections, module)
    raise TrainError(f"more than a norm stands between what enters {name} and its keys")


def _inputs(
    model: nn.Module, block: nn.Module, projections: tuple[nn.Module, ...], batch: Batch
) -> tuple[Any, list[Any], list[tuple[nn.Module, Any, Any]]]:
    """What enters the block, what enters the projections, and (module, input, output) of the modules of the block."""
    starts: list[Any] = []
    inputs: list[Any] = []
    made: list[tuple[nn.Module, Any, Any]] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        starts.append(entering(args, kwargs))

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(entering(args, kwargs))

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
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
