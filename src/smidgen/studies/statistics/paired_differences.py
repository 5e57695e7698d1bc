"""The difference of two arms, paired by task and seed, with intervals.

    d_ts = a_ts - b_ts,    D = mean over tasks of the mean over a task's seeds of d_ts

Two questions, two answers. *On these tasks*: the seeds are a sample, the tasks are not; `t_p` and `interval` are of D
with the spread of seeds within tasks (see `stratified_means`). *On tasks like these*: the tasks are the sample;
`tasks_p` and `tasks_interval` are of the t distribution on task means (Demsar 2006, JMLR 7).

The bootstrap resamples seeds within each task. Few seeds make its tails too short; they are cut where Hesterberg (2015,
arXiv:1411.5279) expands them to, at

    Phi(-sqrt(S / (S - 1)) t_{0.975, T (S - 1)})

for T tasks of S seeds on average. Of one task the interval is that of the t distribution, because resampled means never
leave the data.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from smidgen.common.errors import StudyError
from smidgen.studies.statistics.stratified_means import StratifiedMean, stratified_mean

LEAST = 6  # pairs below which no outcome of a two-sided Wilcoxon test is rarer than 5 %
DRAWS = 10_000
EQUAL = 12  # decimals: differences that are equal but for rounding are equal

Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """A minus b.

    Attributes:
        mean: D.
        interval: on these tasks; None where one pair for each task tells nothing.
        t_p: two-sided, on these tasks; None without a standard error.
        wilcoxon_p: of "no difference on any of these tasks", over all pairs; None for fewer than six that differ.
        tasks_interval, tasks_p: on tasks like these; None for fewer than two tasks, or equal task means.
        pairs: how many; `missing`: how many of the grid have no pair.
        why: why there is no `t_p`, in a sentence.
    """

    mean: float
    interval: Interval | None
    t_p: float | None
    wilcoxon_p: float | None
    tasks_interval: Interval | None
    tasks_p: float | None
    pairs: int
    missing: int
    why: str = ""


def paired_difference(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], *, level: float = 0.95, seed: int = 0
) -> Difference | None:
    """Of two arms' values, (tasks, seeds) each, nan where a run is missing; None without any pair.

    Raises:
        StudyError: the two have different shapes, or a value is infinite.
    """
    rows = [row[~np.isnan(row)] for row in differences(a, b)]
    found = stratified_mean(rows)
    if found is None:
        return None
    kept = [row for row in rows if len(row)]
    means = np.array([row.mean() for row in kept])
    return Difference(
        found.mean,
        _interval(kept, found, level, seed),
        None if found.se is None else 2 * float(stats.t.sf(abs(found.mean) / found.se, found.df)),
        wilcoxon_p(np.concatenate(kept)),
        t_interval(means, level),
        t_p(means),
        found.count,
        np.asarray(a).size - found.count,
        found.why,
    )


def differences(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """a - b as (tasks, seeds), nan where one is missing. Raises StudyError if shapes differ or a value is infinite."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape or x.ndim != 2:
        raise StudyError(f"values of two arms must be (tasks, seeds) each, found {x.shape} and {y.shape}")
    if np.isinf(x).any() or np.isinf(y).any():
        raise StudyError("an infinite value has no difference; leave the run out as a failed one (nan)")
    found: NDArray[np.float64] = np.round(x - y, EQUAL)
    return found


def t_p(d: NDArray[np.float64]) -> float | None:
    """Two-sided p of the t-test of mean 0; None for fewer than two values, or equal ones."""
    if len(d) < 2 or np.ptp(d) == 0:
        return None
    return float(stats.ttest_1samp(d, 0.0).pvalue)


def t_interval(d: NDArray[np.float64], level: float) -> Interval | None:
    """Of the mean, by the t distribution; None for fewer than two values, or equal ones."""
    if len(d) < 2 or np.ptp(d) == 0:
        return None
    half = float(stats.t.isf((1 - level) / 2, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d)))
    return float(d.mean()) - half, float(d.mean()) + half


def wilcoxon_p(d: NDArray[np.float64]) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test; None for fewer than six pairs that differ."""
    if np.count_nonzero(d) < LEAST:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties, where scipy takes the normal distribution
        return float(stats.wilcoxon(d).pvalue)


def _interval(tasks: Sequence[NDArray[np.float64]], found: StratifiedMean, level: float, seed: int) -> Interval | None:
    """On these tasks: the bootstrap's with expanded tails, of one task the t distribution's."""
    if found.se is None:
        return None
    if len(tasks) == 1:
        return t_interval(tasks[0], level)
    rng = np.random.default_rng(seed)
    draws = np.mean([row[rng.integers(len(row), size=(DRAWS, len(row)))].mean(1) for row in tasks], 0)
    seeds = found.count / found.tasks
    spread = np.sqrt(seeds / (seeds - 1)) * stats.t.isf((1 - level) / 2, found.count - found.tasks)
    tail = float(stats.norm.sf(spread))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)
