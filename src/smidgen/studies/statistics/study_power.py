"""What a paired study could have seen: the smallest difference, and the pairs that a smaller one would take.

Pairs of several tasks have n - tasks degrees of freedom, because the spread is that of seeds within tasks.
"""

from __future__ import annotations

import math

from scipy import integrate, optimize, stats

from smidgen.common.errors import StudyError

MOST = 100_000  # pairs


def detection_power(effect: float, pairs: int, level: float = 0.05, tasks: int = 1) -> float:
    """Chance that a two-sided paired t-test sees a true difference of `effect` standard deviations of differences.

        1 - integral over s of [Phi(c s - delta) - Phi(-c s - delta)] f(s)

    with s the ratio of estimated to true standard deviation, chi over the root of its n - tasks degrees of freedom,
    delta = effect sqrt(n), and c the critical t: the noncentral t distribution, also where scipy's own form gives nan.
    """
    df, shift = pairs - tasks, effect * math.sqrt(pairs)
    edge, root = float(stats.t.ppf(1 - level / 2, df)), math.sqrt(df)
    low, high = (float(stats.chi.ppf(q, df)) / root for q in (1e-12, 1 - 1e-12))

    def missed(s: float) -> float:
        inside = stats.norm.cdf(edge * s - shift) - stats.norm.cdf(-edge * s - shift)
        return float(inside * stats.chi.pdf(s * root, df) * root)

    return 1.0 - float(integrate.quad(missed, low, high, limit=200)[0])


def smallest_difference(
    sd: float, pairs: int, tasks: int = 1, *, wanted: float = 0.8, level: float = 0.05
) -> float | None:
    """The true difference that such a study sees with probability `wanted`; None without a task of two pairs.

    Args:
        sd: standard deviation of the paired differences within tasks.
    """
    if pairs <= tasks:
        return None
    if sd == 0:
        return 0.0
    high = 1.0
    while detection_power(high, pairs, level, tasks) < wanted:
        high *= 2
    found = optimize.brentq(lambda effect: detection_power(effect, pairs, level, tasks) - wanted, 0.0, high)
    return float(found) * sd


def pairs_needed(
    sd: float, difference: float, tasks: int = 1, *, wanted: float = 0.8, level: float = 0.05
) -> int | None:
    """How many pairs, on so many tasks, see a true difference with probability `wanted`; None above 100,000.

    Raises:
        StudyError: the difference is 0.
    """
    if difference == 0:
        raise StudyError("no number of pairs tells a difference of 0; name the smallest that would matter")
    if sd == 0:
        return 2 * tasks

    def enough(pairs: int) -> bool:
        return detection_power(abs(difference) / sd, pairs, level, tasks) >= wanted

    low = high = 2 * tasks
    while not enough(high):
        low, high = high, 2 * high
        if high > MOST:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high
