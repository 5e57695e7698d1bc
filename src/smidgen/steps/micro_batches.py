"""A batch in pieces: as much of it at a time as memory allows, with the gradient of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from smidgen.data.kinds.base import kind_named


def pieces(
    places: Sequence[int], batch: dict[str, Any], size: int, kind: str
) -> Iterator[tuple[Sequence[int], dict[str, Any], float]]:
    """Row numbers and tensors of up to `size` rows at a time, with the piece's weight in the batch's mean loss.

    The weight is the share of rows, or of tokens that carry a label where the loss is a mean over tokens.

    Args:
        places: numbers of the rows.
        batch: tensors (B, ...), and anything else, which is handed on.
        kind: name of the task's kind, which says what a row contributes to the mean.
    """
    rows = len(next(iter(value for value in batch.values() if isinstance(value, Tensor))))
    if rows <= size:
        yield places, batch, 1.0
        return
    counts = kind_named(kind).loss_weights(batch, rows)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        cut = {name: value[part] if isinstance(value, Tensor) else value for name, value in batch.items()}
        weight = sum(counts[part]) / sum(counts)
        if weight:
            yield places[part] if len(places) == rows else places, cut, weight
