"""A batch in pieces: as much of it at a time as memory allows, with the gradient of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


def pieces(
    places: Sequence[int], batch: dict[str, Any], size: int, kind: str
) -> Iterator[tuple[Sequence[int], dict[str, Any], float]]:
    """Row numbers and tensors of up to `size` rows at a time, with the piece's weight in the batch's mean loss.

    The weight is the share of rows, or of tokens that carry a label where the loss is a mean over tokens.

    Args:
        places: numbers of the rows.
        batch: tensors (B, ...), and anything else, which is handed on.
        kind: of the task; "causal-lm" predicts each label from the tokens before it.
    """
    rows = len(next(iter(value for value in batch.values() if isinstance(value, Tensor))))
    if rows <= size:
        yield places, batch, 1.0
        return
    counts = _counts(batch, rows, kind)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        cut = {name: value[part] if isinstance(value, Tensor) else value for name, value in batch.items()}
        weight = sum(counts[part]) / sum(counts)
        if weight:
            yield places[part] if len(places) == rows else places, cut, weight


def _counts(batch: dict[str, Any], rows: int, kind: str) -> list[int]:
    """What each row contributes to the mean."""
    labels = batch.get("labels")
    if labels is None or labels.ndim != 2 or kind not in ("causal-lm", "tokens"):
        return [1] * rows
    found: list[int] = (labels[:, 1 if kind == "causal-lm" else 0 :] != -100).sum(1).tolist()
    return found
