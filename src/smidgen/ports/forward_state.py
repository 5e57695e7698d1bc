"""What one forward pass knows: the state that hooks hand on to each other, one object for each pass.

It stands in a thread's own variable and not on modules, so that two threads on one model, or a pass inside of another,
do not see each other's. A `contextvars.ContextVar` would do the same, but torch.compile cannot trace one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class ForwardState:
    """The state of one forward pass.

    Attributes:
        owner: the model whose pass it is; None for modules that are called by themselves.
        outer: the state of the pass around it.
        mask: (B, T), which tokens of the text are no padding, as the model was called with; None for all.
        positions: (B, T), as the model was called with; None if it counts itself.
        rows: (B,) int64, which of several tensors each row of the batch is computed with; None where there is one.
        inputs: of modules with edits, what came to each edit's level.
        taps: what entered a sublayer.
        prompts: of embeddings with edits, what is known of the vectors among the text.
        streams: of stacks of blocks, the tokens that are left and what was tapped.
        called: which of the modules ran whose owner may read their tensors instead.
    """

    owner: nn.Module | None = None
    outer: ForwardState | None = None
    mask: Tensor | None = None
    positions: Tensor | None = None
    rows: Tensor | None = None
    inputs: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    taps: dict[nn.Module, tuple[Tensor, ...]] = field(default_factory=dict)
    prompts: dict[nn.Module, Any] = field(default_factory=dict)
    streams: dict[str, Any] = field(default_factory=dict)
    called: dict[nn.Module, bool] = field(default_factory=dict)

    @property
    def lengths(self) -> Tensor | None:
        """Tokens of each row's text, (B,); None without a mask."""
        return None if self.mask is None else (self.mask != 0).sum(1)


class _Thread(threading.local):
    """Each thread's own pass."""

    current: ForwardState | None = None
    turns: int = 0


_THREAD = _Thread()
_TURN = threading.RLock()


def state() -> ForwardState:
    """The state of the pass that is under way in this thread."""
    if _THREAD.current is None:
        _THREAD.current = ForwardState()
    return _THREAD.current


def open_pass(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attached model. Compiled passes have the thread's one state: they are not nested."""
    outer = _THREAD.current
    if not torch.compiler.is_compiling():
        _THREAD.current = ForwardState(model, outer, rows=None if outer is None else outer.rows)
    mask, now = kwargs.get("attention_mask"), state()
    now.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    now.positions = kwargs.get("position_ids")


def close_pass(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of an attached model (always called)."""
    if torch.compiler.is_compiling():
        state().mask = state().positions = None
    elif _THREAD.current is not None and _THREAD.current.owner is model:
        _THREAD.current = _THREAD.current.outer


def take_turn(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a model on whose modules tensors stand in place of others while a pass is under way, as
    rounded masters do: one thread at a time."""
    if not torch.compiler.is_compiling():
        _TURN.acquire()
        _THREAD.turns += 1


def end_turn(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of it (always called)."""
    if not torch.compiler.is_compiling() and _THREAD.turns:
        _THREAD.turns -= 1
        _TURN.release()


@contextmanager
def rows_from(index: Tensor) -> Iterator[None]:
    """Inside, row b of a batch is computed with the tensors `index[b]` of what is placed for several."""
    outer = _THREAD.current
    _THREAD.current = ForwardState(outer=outer, rows=index)
    try:
        yield
    finally:
        _THREAD.current = outer
