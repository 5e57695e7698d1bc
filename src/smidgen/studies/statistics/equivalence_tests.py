"""Equivalence by two one-sided tests (Schuirmann 1987): a large p-value of a difference is not equality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from smidgen.common.errors import StudyError
from smidgen.studies.statistics.stratified_means import stratified_mean

Verdict = Literal["equivalent", "better", "worse", "cannot tell"]


@dataclass(frozen=True)
class Equivalence:
    """What paired differences say of a margin.

    Attributes:
        p: the larger of the two one-sided p-values; below 0.05 the difference lies within +-margin.
        interval: the 90 % t interval of the mean difference, which lies inside the margin exactly then.
        equivalent: p < 0.05.
        different: the 95 % t interval leaves 0 out; together with `equivalent`: certain, and too small to matter.
        verdict: "equivalent"; else "better" or "worse" if different; else "cannot tell".
    """

    p: float
    interval: tuple[float, float]
    equivalent: bool
    different: bool
    verdict: Verdict


def equivalence(
    d: Sequence[ArrayLike], margin: float, *, higher_is_better: bool = True, level: float = 0.05
) -> Equivalence | None:
    """Of paired differences, (seeds,) for each task, nan where missing, and a margin in the same units.

        t_low = (D + margin) / se,  t_high = (D - margin) / se,  with D, se and df of `stratified_means`

    None where there is no standard error: one seed for each task, or differences that do not vary.

    Raises:
        StudyError: the margin is not above 0, or a difference is infinite.
    """
    if not margin > 0:
        raise StudyError(f"a margin must be above 0, found {margin}")
    rows = [np.atleast_1d(np.asarray(row, np.float64)) for row in d]
    if any(np.isinf(row).any() for row in rows):
        raise StudyError("an infinite difference is within no margin; leave the run out as a failed one (nan)")
    found = stratified_mean([row[~np.isnan(row)] for row in rows])
    if found is None or found.se is None:
        return None
    mean, se, df = found.mean, found.se, found.df
    p = max(float(stats.t.sf((mean + margin) / se, df)), float(stats.t.cdf((mean - margin) / se, df)))
    half = float(stats.t.ppf(1 - level, df)) * se
    apart = abs(mean) > float(stats.t.ppf(1 - level / 2, df)) * se
    return Equivalence(
        p, (mean - half, mean + half), p < level, apart, _verdict(p < level, apart, mean, higher_is_better)
    )


def _verdict(equivalent: bool, different: bool, mean: float, higher_is_better: bool) -> Verdict:
    if equivalent:
        return "equivalent"
    if not different:
        return "cannot tell"
    return "better" if (mean > 0) == higher_is_better else "worse"
