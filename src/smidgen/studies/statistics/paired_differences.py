"""The difference of two arms, paired by task and seed, with an interval.

    d_ts = a_ts - b_ts,    D = mean over tasks of the mean over a task's seeds of d_ts

Tasks are what a study chose, seeds what it drew: the bootstrap resamples seeds within each task and leaves the tasks as
they are, so that the interval is about these tasks. Few seeds make its tails too short; they are cut where Hesterberg
(2015, arXiv:1411.5279) expands them to, at

    Phi(-sqrt(S / (S - 1)) t_{0.975, T (S - 1)})

for T tasks of S seeds on average. Of one task the interval is that of the t distribution, because resampled means never
leave the data. The t and the Wilcoxon test take all d_ts as one sample, and are about these tasks too.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEAST = 6  # pairs below which no outcome of a two-sided Wilcoxon test is rarer than 5 %
DRAWS = 10_000
EQUAL = 12  # decimals: differences that are equal but for rounding are equal


@dataclass(frozen=True)
class Difference:
    """A minus b.

    Attributes:
        mean: D.
        interval: bootstrap, or of one task by the t distribution; None where one pair for each task tells nothing.
        t_p, wilcoxon_p: two-sided; None where there are too few pairs, or all differences are equal.
        pairs: how many; `missing`: how many of the grid have no pair.
        why: why there is no interval, in a sentence.
    """

    mean: float
    interval: tuple[float, float] | None
    t_p: float | None
    wilcoxon_p: float | None
    pairs: int
    missing: int
    why: str = ""


def paired_difference(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], *, level: float = 0.95, seed: int = 0
) -> Difference | None:
    """Of two arms' values, (tasks, seeds) each, nan where a run is missing; None without any pair.

    Raises:
        ValueError: the two have different shapes.
    """
    d = differences(a, b)
    tasks = [row[~np.isnan(row)] for row in d]
    kept = [row for row in tasks if len(row)]
    if not kept:
        return None
    flat, missing = np.concatenate(kept), int(np.isnan(d).sum())
    mean = float(np.mean([row.mean() for row in kept]))
    if max(map(len, kept)) < 2:
        why = "one seed for each task: chance cannot be told from difference"
        return Difference(mean, None, t_p(flat), wilcoxon_p(flat), len(flat), missing, why)
    if len(kept) == 1:
        half = float(stats.t.isf((1 - level) / 2, len(flat) - 1) * flat.std(ddof=1) / np.sqrt(len(flat)))
        return Difference(mean, (mean - half, mean + half), t_p(flat), wilcoxon_p(flat), len(flat), missing)
    rng = np.random.default_rng(seed)
    draws = np.mean([row[rng.integers(len(row), size=(DRAWS, len(row)))].mean(1) for row in kept], 0)
    seeds = len(flat) / len(kept)
    spread = np.sqrt(seeds / (seeds - 1)) * stats.t.isf((1 - level) / 2, max(1.0, len(flat) - len(kept)))
    tail = float(stats.norm.sf(spread))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Difference(mean, (float(low), float(high)), t_p(flat), wilcoxon_p(flat), len(flat), missing)


def differences(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """a - b as (tasks, seeds). Raises ValueError if their shapes differ."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape or x.ndim != 2:
        raise ValueError(f"values of two arms must be (tasks, seeds) each, found {x.shape} and {y.shape}")
    found: NDArray[np.float64] = np.round(x - y, EQUAL)
    return found


def t_p(d: NDArray[np.float64]) -> float | None:
    """Two-sided p of the paired t-test; None for fewer than two pairs or equal differences."""
    if len(d) < 2 or np.ptp(d) == 0:
        return None
    return float(stats.ttest_1samp(d, 0.0).pvalue)


def wilcoxon_p(d: NDArray[np.float64]) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test; None for fewer than six pairs that differ."""
    if np.count_nonzero(d) < LEAST:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties, where scipy takes the normal distribution
        return float(stats.wilcoxon(d).pvalue)
