"""The mean over tasks of means over seeds, and how uncertain it is.

    D = (1/T) sum_t mean_s d_ts,    se^2 = (1/T^2) sum_t v_t,    v_t = sd_t^2 / n_t

with sd_t over the n_t seeds of task t, and the degrees of freedom of Satterthwaite (1946) and Welch (1947),

    df = (sum_t v_t)^2 / sum_t (v_t^2 / f_t),    f_t = n_t - 1

A task of one seed takes the variance pooled over all tasks, with f = sum_t (n_t - 1). Tasks are what a study chose,
seeds what it drew: what varies between tasks is no part of se, so that D is about these tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StratifiedMean:
    """D with its standard error.

    Attributes:
        mean: D.
        se: None if no task has two seeds, or if all seeds of each task are equal: then nothing tells chance.
        df: degrees of freedom of `se`; 0.0 without one.
        count: values, over all tasks.
        tasks: that have one.
        why: why there is no `se`, in a sentence.
    """

    mean: float
    se: float | None
    df: float
    count: int
    tasks: int
    why: str = ""

    @property
    def sd(self) -> float | None:
        """Standard deviation of a value within its task, on average: se sqrt(count)."""
        return None if self.se is None else self.se * float(np.sqrt(self.count))


def stratified_mean(rows: Sequence[NDArray[np.float64]]) -> StratifiedMean | None:
    """Of tasks' values, (n_t,) each; tasks without any are left out. None without any value."""
    kept = [row for row in rows if len(row)]
    if not kept:
        return None
    mean, count = float(np.mean([row.mean() for row in kept])), sum(map(len, kept))
    free = count - len(kept)
    if free == 0:
        why = "one seed for each task: chance cannot be told from difference"
        return StratifiedMean(mean, None, 0.0, count, len(kept), why)
    pooled = sum(float(((row - row.mean()) ** 2).sum()) for row in kept) / free
    if pooled == 0:
        why = "the difference is the same with every seed: chance cannot be told from difference"
        return StratifiedMean(mean, None, 0.0, count, len(kept), why)
    parts = [(row.var(ddof=1) / len(row), len(row) - 1) if len(row) > 1 else (pooled, free) for row in kept]
    total = sum(v for v, _ in parts)
    df = float(total**2 / sum(v**2 / f for v, f in parts))
    return StratifiedMean(mean, float(np.sqrt(total)) / len(kept), df, count, len(kept))
