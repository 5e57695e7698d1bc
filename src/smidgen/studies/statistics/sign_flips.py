"""Two runs on the same test examples, with a score for each example: whether their means are apart beyond chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from smidgen.common.errors import DataError

BATCH = 2_000_000  # values of flipped examples at once: 16 MB


@dataclass(frozen=True)
class ScoreDifference:
    """Scores of two runs on the same examples.

    Attributes:
        mean: of a minus b.
        p: two-sided.
        examples: how many.
        exact: whether all 2^n flips were counted, not a sample of them.
    """

    mean: float
    p: float
    examples: int
    exact: bool


def flip_signs(a: ArrayLike, b: ArrayLike, *, draws: int = 9_999, seed: int = 0) -> ScoreDifference:
    """Paired permutation test of the mean (Fisher 1935, The Design of Experiments, section 21).

    If the runs are alike, the difference of an example has either sign with probability 1/2. All 2^n flips are counted
    if they are `draws` at most; else p = (1 + k) / (1 + draws) for each side, k the random flips whose mean goes as
    far. p is twice the smaller side's, 1 at most.

    Args:
        a: scores of one run, (examples,).
        b: of the other, on the same examples in the same order.

    Raises:
        DataError: no examples, shapes that differ, a score that is no finite number, or fewer than 100 draws.
    """
    if draws < 100:
        raise DataError(f"a permutation test needs 100 draws to reach a p of 2 %; found {draws}")
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape or x.ndim != 1 or not x.size:
        raise DataError(
            f"scores of two runs must be of the same examples, (examples,) each; found {x.shape}, {y.shape}"
        )
    if odd := int((~(np.isfinite(x) & np.isfinite(y))).sum()):
        raise DataError(f"every example needs a finite score of both runs; {odd} of {x.size} lack one")
    d = x - y
    if d.size == 1:  # scipy wants two; one difference is as large with either sign
        return ScoreDifference(float(d[0]), 1.0, 1, True)
    found = stats.permutation_test(
        (d,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=draws,
        batch=max(1, BATCH // d.size),
        random_state=np.random.default_rng(seed),
    )
    return ScoreDifference(float(d.mean()), float(found.pvalue), d.size, d.size <= math.log2(draws))
