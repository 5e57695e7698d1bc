"""Two runs on the same test examples: whose answers are better, beyond chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from smidgen.common.errors import StudyError

Metric = Callable[[Sequence[object], Sequence[object]], float]


def mcnemar_p(a_right: Sequence[bool], b_right: Sequence[bool]) -> float | None:
    """Exact two-sided p of McNemar's test (1947): of examples that one alone has right, half should be each one's.

    None if both are right and wrong on the same examples.

    Raises:
        StudyError: they are of different numbers of examples.
    """
    if len(a_right) != len(b_right):
        raise StudyError(f"answers to {len(a_right)} and {len(b_right)} examples cannot be paired")
    one = sum(bool(x) and not y for x, y in zip(a_right, b_right, strict=True))
    other = sum(bool(y) and not x for x, y in zip(a_right, b_right, strict=True))
    return None if one + other == 0 else float(stats.binomtest(one, one + other, 0.5).pvalue)


def permutation_p(
    metric: Metric,
    a: Sequence[object],
    b: Sequence[object],
    references: Sequence[object],
    *,
    draws: int = 199,
    seed: int = 0,
) -> float | None:
    """Two-sided p of the paired permutation test (Noreen 1989; Yeh 2000, arXiv:cs/0008005): if two runs are alike,
    their answers to an example can be exchanged.

        p = (1 + k) / (1 + draws),  k the draws in which |metric(a') - metric(b')| goes as far as it does

    where a', b' are a, b with the answers to each example exchanged with probability 1/2. For metrics that are no means
    over examples (F1, Matthews, Pearson) as well. None if all answers are the same.

    Raises:
        StudyError: no examples, different numbers of them, or a metric that is not finite on them.
    """
    count = len(references)
    if not count or len(a) != count or len(b) != count:
        raise StudyError(f"{len(a)} and {len(b)} answers to {count} examples cannot be compared")
    if list(a) == list(b):
        return None
    rng, told = np.random.default_rng(seed), abs(metric(a, references) - metric(b, references))
    if not math.isfinite(told):
        raise StudyError("the metric of one of the runs is not finite")
    far = 0
    for swap in rng.random((draws, count)) < 0.5:
        one = [y if s else x for s, x, y in zip(swap, a, b, strict=True)]
        other = [x if s else y for s, x, y in zip(swap, a, b, strict=True)]
        apart = abs(metric(one, references) - metric(other, references))
        far += not apart < told - 1e-12  # what is undefined counts against a difference
    return (1 + far) / (1 + draws)
