"""What a paired study could have seen: the smallest difference, and the pairs that a smaller one would take."""

from __future__ import annotations

import math

from scipy import integrate, optimize, stats

MOST = 100_000  # pairs


def detection_power(effect: float, pairs: int, level: float = 0.05) -> float:
    """Chance that a two-sided paired t-test sees a true difference of `effect` standard deviations of differences.

        1 - integral over s of [Phi(c s - delta) - Phi(-c s - delta)] f(s)

    with s the ratio of estimated to true standard deviation, chi over the root of its n - 1 degrees of freedom, delta =
    effect sqrt(n), and c the critical t: the noncentral t distribution, also where scipy's own form gives nan.
    """
    df, shift = pairs - 1, effect * math.sqrt(pairs)
    edge, root = float(stats.t.ppf(1 - level / 2, df)), math.sqrt(df)
    low, high = (float(stats.chi.ppf(q, df)) / root for q in (1e-12, 1 - 1e-12))

    def missed(s: float) -> float:
        inside = stats.norm.cdf(edge * s - shift) - stats.norm.cdf(-edge * s - shift)
        return float(inside * stats.chi.pdf(s * root, df) * root)

    return 1.0 - float(integrate.quad(missed, low, high, limit=200)[0])


def smallest_difference(sd: float, pairs: int, *, wanted: float = 0.8, level: float = 0.05) -> float | None:
    """The true difference that such a study sees with probability `wanted`; None for fewer than two pairs.

    Args:
        sd: standard deviation of the paired differences, n - 1 in the denominator.
    """
    if pairs < 2:
        return None
    if sd == 0:
        return 0.0
    high = 1.0
    while detection_power(high, pairs, level) < wanted:
        high *= 2
    found = optimize.brentq(lambda effect: detection_power(effect, pairs, level) - wanted, 0.0, high)
    return float(found) * sd


def pairs_needed(sd: float, difference: float, *, wanted: float = 0.8, level: float = 0.05) -> int | None:
    """How many pairs see a true difference with probability `wanted`; None above 100,000.

    Raises:
        ValueError: the difference is 0.
    """
    if difference == 0:
        raise ValueError("no number of pairs tells a difference of 0; name the smallest that would matter")
    if sd == 0:
        return 2
    low, high = 2, 2
    while detection_power(abs(difference) / sd, high, level) < wanted:
        low, high = high, 2 * high
        if high > MOST:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if detection_power(abs(difference) / sd, middle, level) >= wanted else (middle + 1, high)
        )
    return high
