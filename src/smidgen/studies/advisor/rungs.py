"""The rungs of successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943), with arms that stay comparable.

Configurations are arms x learning rates. Halving them freely would give one arm more trials than another; here a rung
keeps half of the arms and half of the rates of each, so that all arms of a rung try as many, and the next has more
examples. The last rung compares two arms over several seeds, and it alone reads the test split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from smidgen.data.metrics import METRICS
from smidgen.studies.comparison.run_store import Result

Rates = Mapping[str, tuple[float, ...] | None]  # arm -> those that it tries; None for its own


@dataclass(frozen=True)
class Rung:
    """One round.

    Attributes:
        arms: that it runs, with their rates.
        examples: to train on; None for all.
        seeds: how many.
        last: whether it is the one that is tested.
        seconds: that it took; None before it is over.
    """

    arms: Rates
    examples: int | None
    seeds: int
    last: bool
    seconds: float | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`, also after JSON."""
        arms = {arm: None if rates is None else tuple(rates) for arm, rates in data["arms"].items()}
        return cls(arms, data["examples"], data["seeds"], data["last"], data["seconds"])


def best_arms(results: Sequence[Result], count: int) -> list[str]:
    """The arms with the best run on validation, so many of them; arms whose runs all failed are not among them."""
    best = {arm: max((_score(r) for r in results if r.arm == arm), default=-math.inf) for arm in _arms(results)}
    able = [arm for arm in best if best[arm] > -math.inf]
    return sorted(able, key=lambda arm: -best[arm])[:count]


def best_rates(results: Sequence[Result], arm: str, count: int) -> tuple[float, ...]:
    """An arm's rates that are best on validation, so many of them, from the lowest."""
    means = {r.lr: _score(r) for r in results if r.arm == arm}
    return tuple(sorted(sorted(means, key=lambda lr: -means[lr])[:count]))


def middle(rates: Sequence[float], count: int) -> tuple[float, ...]:
    """So many of the rates, those in the middle, from the lowest; of two middles the lower."""
    ordered = sorted(rates)
    start = max(0, (len(ordered) - count) // 2)
    return tuple(ordered[start : start + count])


def _arms(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.arm for result in results))


def _score(result: Result) -> float:
    """Validation, more is better; a failed run is the worst."""
    value = result.validation
    if value is None or math.isnan(value):
        return -math.inf
    return value if METRICS[result.metric].higher_is_better else -value
