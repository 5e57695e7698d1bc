"""PrefixCache: the hidden states at the lowest edit, computed once per example."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from smidgen.common.devices import carried
from smidgen.common.errors import SmidgenError, TrainError
from smidgen.common.memory import memory_guard
from smidgen.data.kinds.base import Collate
from smidgen.efficiency.prefix_cache.cache_key import key
from smidgen.efficiency.prefix_cache.cut_point import cut_of, why_not
from smidgen.efficiency.prefix_cache.equivalence_check import EquivalenceCheck, batch_of, few_examples
from smidgen.efficiency.prefix_cache.recorded_pass import in_eval_mode, result_of, states_at
from smidgen.efficiency.prefix_cache.resume_forward import Seam, feeding
from smidgen.efficiency.prefix_cache.storage import from_file, in_file, in_memory
from smidgen.efficiency.prefix_cache.token_layout import Rows, TokenLayout, kept_of, pads_left
from smidgen.efficiency.prefix_cache.within_block import inner_cut
from smidgen.planning.plans import Plan

_BROKEN = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)


class PrefixCache:
    """Hidden states of the examples of one split at the lowest edit of an attached model.

    Nothing of the model is changed but inside `feeding`. What is trained lies above, so the states stay true for as
    long as the base does.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._model, self._plan = model, plan
        self._cut = cut_of(model, plan)
        self._seam: Seam | None = None
        self._left = False
        self._layout = TokenLayout.of([])
        self._states = torch.empty(0, 0)
        self._seconds = 0.0

    @classmethod
    def of(cls, model: nn.Module, plan: Plan) -> PrefixCache | None:
        """An empty cache for a model with `plan` attached; None where there is nothing to keep (`why_not` says why)."""
        return None if why_not(model, plan) else cls(model, plan)

    @property
    def nbytes(self) -> int:
        """Size of what is kept."""
        return self._states.numel() * self._states.element_size()

    @property
    def seconds(self) -> float:
        """What `fill` took."""
        return self._seconds

    @property
    def examples(self) -> int:
        """Number of examples that are kept."""
        return len(self._layout.lengths)

    def fill(
        self,
        rows: Rows,
        collate: Collate,
        *,
        batch_size: int = 64,
        limit_bytes: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compute and keep the states of all rows, in eval mode and without gradient, then check them on a few.

        Args:
            rows: examples as `collate` takes them.
            collate: list of rows -> batch; padding may lie on either side.
            batch_size: examples at a time, of like length.
            limit_bytes: beyond this, the states lie in a file in `folder`; None for no limit.
            folder: for the file, which is taken up again if the base, the cut and the inputs are the same.
            progress: called with the number of examples done and of all.

        Raises:
            TrainError: the states depend on more than the example (chance, padding, how often it is read), the model
                cannot start at its first edited block, or there is no room.
        """
        start = time.perf_counter()
        self._seam = None
        with in_eval_mode(self._model), memory_guard(batch_size):
            trial = self._trial(rows, collate)
            self._layout, self._left = TokenLayout.of(trial.lengths), trial.left
            path = self._path(trial, rows, limit_bytes, folder)
            if path is None or not self._taken_up(trial, path):
                parts = self._computed(rows, collate, batch_size, progress)
                self._states = self._stored(trial, parts, path)
                self._check(trial)
        self._seam = trial.seam
        self._seconds = time.perf_counter() - start

    def _trial(self, rows: Rows, collate: Collate) -> EquivalenceCheck:
        """At the finer cut within the first edited block if the model can start there, else in front of the block."""
        whole = cut_of(self._model, self._plan)
        finer = inner_cut(whole, self._plan, few_examples(self._model, rows, collate))
        for self._cut in (finer, whole) if finer is not None else (whole,):
            try:
                trial = EquivalenceCheck.of(self._cut, rows, collate)
                self._compare(trial, trial.seen.states)
                return trial
            except TrainError:
                if self._cut is whole:
                    raise
        raise AssertionError("unreachable")

    def batch(self, places: Sequence[int], length: int | None = None) -> Tensor:
        """States (B, T, d) of the examples with these numbers, zeros at padding, on the model's device.

        Args:
            places: numbers of rows.
            length: T, as the batch's own; by default that of the longest example.

        Raises:
            TrainError: the cache is empty, or an example is longer.
        """
        self._filled()
        return self._padded(places, length)

    def longest(self, places: Sequence[int]) -> int:
        """Tokens of the longest of these examples."""
        return max(self._layout.lengths[place] for place in places)

    def first(self, places: Sequence[int]) -> Tensor:
        """States (B, 1, d) of the first tokens of these examples. Raises TrainError if the cache is empty."""
        self._filled()
        starts = torch.tensor([self._layout.starts[place] for place in places])
        return carried(self._states[starts][:, None], next(self._model.parameters()).device)

    @property
    def ends_rowwise(self) -> bool:
        """Whether no block runs in whole above the cut, so that nothing above it may mix tokens."""
        last = len(self._cut.blocks) - 1
        inside = self._cut.index == last and self._cut.site is not None
        return not self._left and (inside or self._cut.index > last)

    def feeding(self, hidden: Tensor, length: int | None = None) -> AbstractContextManager[None]:
        """Inside, `model(**batch)` starts at the cut with `hidden` (B, T, d), or (B, 1, d) for the first tokens alone.

        The embeddings and what else lies below are not computed. Whatever happens, the model is as it was afterwards.
        `length`: tokens of the batch, if they are not T.

        Raises:
            TrainError: the cache is empty.
        """
        return feeding(self._filled(), hidden, length)

    def _filled(self) -> Seam:
        if self._seam is None:
            raise TrainError("the cache of hidden states is empty; call fill(rows, collate)")
        return self._seam

    def _padded(self, places: Sequence[int], length: int | None) -> Tensor:
        """Kept states of these examples, (batch, length, width), padded with zeros on the side of the batch."""
        lengths = [self._layout.lengths[place] for place in places]
        length = max(lengths) if length is None else length
        if max(lengths) > length:
            raise TrainError(f"{max(lengths)} tokens of an example are kept, but the batch has room for {length}")
        counts = torch.tensor(lengths)[:, None]
        starts = torch.tensor([self._layout.starts[place] for place in places])[:, None]
        token = torch.arange(length)[None] - (length - counts if self._left else 0)  # (B, T), of its example
        kept = (token >= 0) & (token < counts)
        rows = (starts + token).where(kept, 0).flatten()
        hidden = self._states.index_select(0, rows)  # copies whole rows, as indexing by (B, T) does not
        hidden.index_fill_(0, (~kept).flatten().nonzero().squeeze(1), 0)
        return carried(hidden.view(*kept.shape, -1), next(self._model.parameters()).device)

    def _shape(self, trial: EquivalenceCheck) -> tuple[int, int]:
        return self._layout.tokens, trial.seen.states.shape[2]

    def _path(
        self, trial: EquivalenceCheck, rows: Rows, limit: int | None, folder: str | os.PathLike[str] | None
    ) -> Path | None:
        """Where states that are over the limit in memory go; None if they are not."""
        tokens, width = self._shape(trial)
        size = tokens * width * trial.seen.states.element_size()
        if limit is None or size <= limit:
            return None
        if folder is None:
            raise TrainError(
                f"hidden states of {size:,} bytes are over cache_bytes={limit:,}, and only cache=True with a folder "
                "(out=) puts them into a file"
            )
        return Path(folder) / f"prefix-{key(self._model, self._plan, rows, self._cut)}.states"

    def _taken_up(self, trial: EquivalenceCheck, path: Path) -> bool:
        """Whether a file has the states; one that does not stand the check is not used."""
        states = from_file(path, self._shape(trial), trial.seen.states.dtype)
        if states is None:
            return False
        self._states = states
        try:
            self._check(trial)
        except TrainError:
            return False
        return True

    def _stored(self, trial: EquivalenceCheck, parts: Iterator[Tensor], path: Path | None) -> Tensor:
        shape, dtype = self._shape(trial), trial.seen.states.dtype
        return in_memory(parts, shape, dtype) if path is None else in_file(parts, path, shape, dtype)

    def _computed(
        self, rows: Rows, collate: Collate, size: int, progress: Callable[[int, int], None] | None
    ) -> Iterator[Tensor]:
        """States (n, d) of the tokens of each batch, in the order of the layout."""
        done = 0
        for places in self._layout.chunks(size):
            batch = batch_of(self._model, rows, collate, places)
            states = states_at(self._cut, batch).cpu()
            kept = kept_of(self._cut, batch, tuple(states.shape), [self._layout.lengths[i] for i in places])
            pads_left(self._cut, kept, self._left)
            yield states[kept]
            done += len(places)
            if progress is not None:
                progress(done, len(rows))

    def _check(self, trial: EquivalenceCheck) -> None:
        """A few examples with and without the cache."""
        cached = self._padded(trial.places, trial.kept.shape[1])
        trial.check_states(self._cut, cached.cpu())
        self._compare(trial, cached)

    def _compare(self, trial: EquivalenceCheck, states: Tensor) -> None:
        """Logits and loss of a few examples that start at the cut with these states (b, T, d)."""
        try:
            with feeding(trial.seam, states):
                result, loss = result_of(self._model(**trial.batch))
        except (SmidgenError, torch.OutOfMemoryError):
            raise
        except _BROKEN as error:
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise self._cut.refusal(f"it cannot start in the middle ({said})") from error
        trial.check_result(self._cut, result, loss)
