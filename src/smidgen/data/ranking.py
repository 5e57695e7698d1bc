"""Metrics of retrieval: where the right answers stand among all of a split's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smidgen.data.metrics import Metric

_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class RankedPair:
    """Vectors of a text and of another, of length 1, and keys that are equal where texts are."""

    first: NDArray[np.float32]
    second: NDArray[np.float32]
    first_key: int
    second_key: int


def mrr(predictions: Sequence[RankedPair], references: Sequence[int]) -> float:
    """Mean over first texts of 1 / the place of the first right one among all second texts of the split."""
    found = [1 / ranks[0] for ranks in _ranks(predictions, references)]
    return float(np.mean(found)) if found else math.nan


def recall_at_1(predictions: Sequence[RankedPair], references: Sequence[int]) -> float:
    """Mean share of a first text's right ones that come first."""
    return _recall(predictions, references, 1)


def recall_at_10(predictions: Sequence[RankedPair], references: Sequence[int]) -> float:
    """Mean share of a first text's right ones that are among the first ten."""
    return _recall(predictions, references, 10)


def _recall(predictions: Sequence[RankedPair], references: Sequence[int], most: int) -> float:
    found = [np.mean(ranks <= most) for ranks in _ranks(predictions, references)]
    return float(np.mean(found)) if found else math.nan


def _ranks(pairs: Sequence[RankedPair], right: Sequence[int]) -> Iterator[NDArray[np.int64]]:
    """Places, from 1 and in order, of the right second texts of each first text that has any.

    Equal texts count once. Of two that are equally near, the wrong one comes first.
    """
    seconds = {pair.second_key: pair.second for pair in pairs}
    place = {key: i for i, key in enumerate(seconds)}
    firsts: dict[int, tuple[NDArray[np.float32], set[int]]] = {}
    for pair, label in zip(pairs, right, strict=True):
        if label:
            firsts.setdefault(pair.first_key, (pair.first, set()))[1].add(place[pair.second_key])
    table, asked = np.stack(list(seconds.values())), list(firsts.values())
    for start in range(0, len(asked), _CHUNK):
        some = asked[start : start + _CHUNK]
        scores = np.stack([vector for vector, _ in some]) @ table.T
        for row, (_, wanted) in zip(scores, some, strict=True):
            own = sorted(wanted)
            wrong = np.sort(np.delete(row, own))
            behind = np.searchsorted(wrong, np.sort(row[own])[::-1], side="left")  # wrong ones that are farther
            yield np.arange(1, len(own) + 1) + len(wrong) - behind


MRR = Metric("mrr", mrr)
RECALL_AT_1 = Metric("recall_at_1", recall_at_1)
RECALL_AT_10 = Metric("recall_at_10", recall_at_10)
