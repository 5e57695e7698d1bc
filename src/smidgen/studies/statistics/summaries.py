"""One arm's values over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Mean, standard deviation (n - 1 in the denominator; None for one value), the worst value, and how many."""

    mean: float
    sd: float | None
    worst: float
    count: int


def summary(values: Sequence[float], *, higher_is_better: bool = True) -> Summary | None:
    """Of some values; None if there are none."""
    if not len(values):
        return None
    found = np.asarray(values, np.float64)
    sd = float(found.std(ddof=1)) if len(found) > 1 else None
    worst = found.min() if higher_is_better else found.max()
    return Summary(float(found.mean()), sd, float(worst), len(found))
