"""Micro-batches: as much of a batch at a time as memory allows, with the gradient of the whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from smidgen.common.errors import TrainError
from smidgen.data.kinds.base import Batch, kind_named
from smidgen.steps.objectives import BATCH, MEAN, SUM


class MicroBatch(NamedTuple):
    """Some rows of a batch, computed in one forward and backward pass.

    Attributes:
        places: numbers of the rows.
        batch: their tensors, and whatever else the batch holds.
        weight: of their loss in the batch's.
        share: of what is added once for a batch.
    """

    places: Sequence[int]
    batch: Batch
    weight: float
    share: float


def split_batch(
    places: Sequence[int],
    batch: Mapping[str, Tensor],
    size: int,
    kind: str,
    reduction: str = MEAN,
    total: float | None = None,
) -> Iterator[MicroBatch]:
    """A batch in micro-batches of up to `size` rows.

    A micro_batch's weight in a mean is its share of rows, or of tokens that carry a label where the loss is a mean over
    those; in a sum it is 1.

    Args:
        places: numbers of the rows.
        batch: tensors (B, ...), and anything else, which is handed on.
        kind: name of the task's kind, which says what a row contributes to the mean.
        reduction: "mean" or "sum", see `Objective`.
        total: rows, or tokens that carry a label, of a larger batch that this one is a process's share of.

    Raises:
        TrainError: a batch whose examples depend on each other ("batch") has more than `size` rows.
    """
    rows = rows_in(batch)
    if rows <= size and total is None:
        yield MicroBatch(places, dict(batch), 1.0, 1.0)
        return
    if reduction == BATCH and rows > size:
        raise TrainError(
            f"the loss couples the {rows} examples of a batch, which cannot be computed {size} at a time; set "
            f"batch_size={size}, or leave max_memory out"
        )
    counts = kind_named(kind).loss_weights(batch, rows)
    total = sum(counts) if total is None else total
    for start in range(0, rows, size):
        part = slice(start, start + size)
        cut = {name: value[part] if isinstance(value, Tensor) else value for name, value in batch.items()}
        share = sum(counts[part]) / total if total else math.nan
        if share:
            here = places[part] if len(places) == rows else places
            yield MicroBatch(here, cut, 1.0 if reduction == SUM else share, share)


def rows_in(batch: Mapping[str, object]) -> int:
    """Rows of a batch."""
    return len(next(value for value in batch.values() if isinstance(value, Tensor)))


def first_row(places: Sequence[int], batch: Mapping[str, Tensor]) -> MicroBatch:
    """The first row of a batch, to be computed and count for nothing."""
    cut = {name: value[:1] if isinstance(value, Tensor) else value for name, value in batch.items()}
    return MicroBatch(places[:1], cut, 0.0, 0.0)
