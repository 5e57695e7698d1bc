"""Equivalence by two one-sided tests (Schuirmann 1987): a large p-value of a difference is not equality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

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
    d: Sequence[float], margin: float, *, higher_is_better: bool = True, level: float = 0.05
) -> Equivalence | None:
    """Of paired differences (n,), and a margin in the same units; None for fewer than two pairs.

        t_low = (mean + margin) / se,  t_high = (mean - margin) / se,  se = sd / sqrt(n),  n - 1 degrees of freedom

    Raises:
        ValueError: the margin is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"a margin must be above 0, found {margin}")
    values = np.asarray(d, np.float64)
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return None
    mean, se, df = float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))), len(values) - 1
    if np.ptp(values) == 0:
        inside, apart = abs(mean) < margin, mean != 0
        verdict = _verdict(inside, apart, mean, higher_is_better)
        return Equivalence(0.0 if inside else 1.0, (mean, mean), inside, apart, verdict)
    p = max(float(stats.t.sf((mean + margin) / se, df)), float(stats.t.cdf((mean - margin) / se, df)))
    half = float(stats.t.ppf(1 - level, df)) * se
    apart = abs(mean) > float(stats.t.ppf(1 - level / 2, df)) * se
    inside = p < level
    verdict = _verdict(inside, apart, mean, higher_is_better)
    return Equivalence(p, (mean - half, mean + half), inside, apart, verdict)


def _verdict(equivalent: bool, different: bool, mean: float, higher_is_better: bool) -> Verdict:
    if equivalent:
        return "equivalent"
    if not different:
        return "cannot tell"
    return "better" if (mean > 0) == higher_is_better else "worse"
