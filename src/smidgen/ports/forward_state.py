"""What one forward pass knows: the state that hooks hand on to each other, one object for each pass.

It stands in a thread's own variable and not on modules, so that two threads on one model, or a pass inside of another,
do not see each other's. A `contextvars.ContextVar` would do the same, but torch.compile cannot trace one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from smidgen.common.errors import AttachError
from smidgen.common.hook_types import Args
from smidgen.methods.token_map import TokenMap
from smidgen.ports.prompts.token_insertion import TokenInsertion

RESULTS = "_smidgen_results"  # attribute of a model: rows (B,) of results -> Mix


@dataclass(frozen=True, eq=False)
class RowBlock:
    """Rows of a mixed batch, one behind the other, that have results of one layout.

    Attributes:
        layout: which edits act on them; None for the untouched base.
        rows: their places in the batch.
        tables: saved name -> (n, ...) of n rows, the tensors of each.
    """

    layout: str | None
    rows: slice
    tables: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of rows."""
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True, eq=False)
class Mix:
    """A batch whose rows have different results.

    Attributes:
        blocks: all rows, in their order.
        heads: name -> (B, ...), the head's tensors of each row, where any row brings its own.
        poolings: pooling -> (n,) int64, the rows that have it; the others have the class's own.
    """

    blocks: tuple[RowBlock, ...]
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    poolings: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of rows."""
        return int(self.blocks[-1].rows.stop)

    def check(self, x: Tensor, place: str) -> None:
        """Raises AttachError if a tensor has not one part for each row."""
        if len(x) != self.size:
            raise AttachError(
                f"{place} gets {tuple(x.shape)} in a mixed batch of {self.size} rows, so which part belongs to which "
                "row is not known; run such results one at a time"
            )


@dataclass(eq=False)
class Stream:
    """The hidden states that go through one stack of blocks.

    Attributes:
        mask: (B, T), which tokens are no padding, as the model around the stack was called with; None for all.
        positions: as it was called with; None if it counts itself.
        cached: how many tokens a cache held before.
        tokens: those that are left; None before the first block that asks.
        states: what was tapped, without gradient.
    """

    mask: Tensor | None = None
    positions: Tensor | None = None
    cached: int = 0
    tokens: TokenMap | None = None
    states: list[Tensor] = field(default_factory=list)


@dataclass(eq=False)
class Prompted:
    """What a pass knows of the prompt among its tokens.

    Attributes:
        inserted: its places.
        tokens: of the text.
        mask: of the text, None without one.
        pending: vectors (B or 1, n, width) and ids (B, n + T) until they are embedded.
    """

    inserted: TokenInsertion
    tokens: int
    mask: Tensor | None = None
    pending: tuple[Tensor, Tensor] | None = None


@dataclass(eq=False)
class ForwardState:
    """The state of one forward pass.

    Attributes:
        owner: the model whose pass it is; None for modules that are called by themselves.
        outer: the state of the pass around it.
        rows: (B,) int64, which of several results each row of the batch is computed with; None where there is one.
        mix: the results themselves, row by row.
        block: the rows on which edits act just now.
        inputs: of modules with edits, what came to each edit's level.
        taps: what entered a sublayer.
        prompts: of embeddings with edits, what is known of the vectors among the text.
        streams: of stacks of blocks, by path: mask and positions, the tokens that are left, what was tapped.
        called: which of the modules ran whose owner may read their tensors instead.
        ends: it is to be cleared when the backward pass that is under way ends.
    """

    owner: nn.Module | None = None
    outer: ForwardState | None = None
    rows: Tensor | None = None
    mix: Mix | None = None
    block: RowBlock | None = None
    inputs: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    taps: dict[nn.Module, tuple[Tensor, ...]] = field(default_factory=dict)
    prompts: dict[nn.Module, Prompted] = field(default_factory=dict)
    streams: dict[str, Stream] = field(default_factory=dict)
    called: dict[nn.Module, bool] = field(default_factory=dict)
    ends: bool = False

    def forget(self) -> None:
        """Let go of the tensors that modules left here."""
        for kept in (self.inputs, self.taps, self.prompts, self.streams, self.called):
            kept.clear()
        self.ends = False

    def mixed(self) -> Mix:
        """`mix`, of a model on which several results stand.

        Raises:
            AttachError: nothing says which result a row belongs to.
        """
        results = None if self.owner is None else self.owner.__dict__.get(RESULTS)
        if self.mix is None and self.rows is not None and results is not None:
            self.mix = results(self.rows)
        if self.mix is None:
            raise AttachError("several results are attached; say which one each row has, in `with rows_from(index):`")
        return self.mix

    @contextmanager
    def on(self, block: RowBlock) -> Iterator[None]:
        """Inside, edits take the tensors of these rows."""
        self.block = block
        try:
            yield
        finally:
            self.block = None


class _Thread(threading.local):
    """Each thread's own pass."""

    current: ForwardState | None = None
    turns: int = 0


_THREAD = _Thread()
_TURN = threading.RLock()


def state() -> ForwardState:
    """The state of the pass that is under way in this thread; for modules outside of any pass, the thread's own.

    Activation checkpointing runs modules again in the backward pass, and stops where it has what it needs, before the
    last of them are left: what those keep goes when the backward pass ends.
    """
    if _THREAD.current is None:
        _THREAD.current = ForwardState()
    found = _THREAD.current
    if found.owner is None and not torch.compiler.is_compiling() and not found.ends and in_backward():
        found.ends = True
        torch.autograd.Variable._execution_engine.queue_callback(found.forget)
    return found


def in_backward() -> bool:
    """Whether this thread runs autograd's backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def open_pass(model: nn.Module, args: Args) -> None:
    """Forward pre-hook of an attached model. Compiled passes have the thread's one state: they are not nested."""
    outer = _THREAD.current
    if not torch.compiler.is_compiling():
        _THREAD.current = ForwardState(model, outer)
        if outer is not None:
            _THREAD.current.rows, _THREAD.current.mix = outer.rows, outer.mix


def close_pass(model: nn.Module, args: Args, output: object) -> None:
    """Forward hook of an attached model (always called)."""
    if not torch.compiler.is_compiling() and _THREAD.current is not None and _THREAD.current.owner is model:
        _THREAD.current = _THREAD.current.outer


def take_turn(model: nn.Module, args: Args) -> None:
    """Forward pre-hook of a model on whose modules tensors stand in place of others while a pass is under way, as
    rounded masters do: one thread at a time."""
    if not torch.compiler.is_compiling():
        _TURN.acquire()
        _THREAD.turns += 1


def end_turn(model: nn.Module, args: Args, output: object) -> None:
    """Forward hook of it (always called)."""
    if not torch.compiler.is_compiling() and _THREAD.turns:
        _THREAD.turns -= 1
        _TURN.release()


@contextmanager
def rows_from(index: Tensor | Sequence[int]) -> Iterator[None]:
    """Inside, row b of a batch is computed with result `index[b]` of those that are attached (`attached_rows`).

    Args:
        index: (B,) whole numbers, one for each row of the batches to come.
    """
    outer = _THREAD.current
    _THREAD.current = ForwardState(outer=outer, rows=torch.as_tensor(index, dtype=torch.long))
    try:
        yield
    finally:
        _THREAD.current = outer


@contextmanager
def mixed(mix: Mix) -> Iterator[None]:
    """Inside, a batch's rows are computed as a mix says."""
    outer = _THREAD.current
    _THREAD.current = ForwardState(outer=outer, mix=mix)
    try:
        yield
    finally:
        _THREAD.current = outer
