"""Two runs on the same test examples: whose answers are better, beyond chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

Metric = Callable[[Sequence[object], Sequence[object]], float]


def mcnemar_p(a_right: Sequence[bool], b_right: Sequence[bool]) -> float | None:
    """Exact two-sided p of McNemar's test (1947): of examples that one alone has right, half should be each one's.

    None if both are right and wrong on the same examples.

    Raises:
        ValueError: they are of different numbers of examples.
    """
    if len(a_right) != len(b_right):
        raise ValueError(f"answers to {len(a_right)} and {len(b_right)} examples cannot be paired")
    one = sum(bool(x) and not y for x, y in zip(a_right, b_right, strict=True))
    other = sum(bool(y) and not x for x, y in zip(a_right, b_right, strict=True))
    return None if one + other == 0 else float(stats.binomtest(one, one + other, 0.5).pvalue)


def paired_bootstrap(
    metric: Metric,
    a: Sequence[object],
    b: Sequence[object],
    references: Sequence[object],
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of metric(a) - metric(b) over test examples drawn with replacement, the same for both.

    For metrics that are no means over examples (F1, Matthews, Pearson, BLEU) as well (Koehn 2004).

    Raises:
        ValueError: no examples, or different numbers of them.
    """
    count = len(references)
    if not count or len(a) != count or len(b) != count:
        raise ValueError(f"{len(a)} and {len(b)} answers to {count} examples cannot be compared")
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        rows = rng.integers(count, size=count)
        right = [references[i] for i in rows]
        found.append(metric([a[i] for i in rows], right) - metric([b[i] for i in rows], right))
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
