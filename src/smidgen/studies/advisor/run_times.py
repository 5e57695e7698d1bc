"""How long runs take: predicted for other numbers of examples from those that were measured.

A run over `epochs` of n training and v validation examples does

    w(n) = epochs (3 n + v)

forward passes' worth of work, as a backward pass costs about two forward ones; seconds are taken as proportional to it.
Recipes that skip part of the backward pass are overestimated where n grows, so that a budget is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

TRAINED = 3  # forward passes that training on an example costs


@dataclass(frozen=True)
class RunTimes:
    """Seconds of an arm's run.

    Attributes:
        validation: examples that a run is validated on after each epoch.
        epochs: of a run.
        measured: arm -> (examples, seconds) of its largest run.
        overhead: of all that happens on all of the time of runs: loading, writing.
    """

    validation: int
    epochs: int
    measured: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    overhead: float = 1.0

    def work(self, examples: float) -> float:
        """w(n)."""
        return self.epochs * (TRAINED * examples + self.validation)

    def seconds(self, arms: Iterable[str], examples: int) -> float:
        """Of a run of each of the arms together; one that was not measured takes as long as the longest."""
        return self.overhead * self.work(examples) * sum(self._rate(arm) for arm in arms)

    def examples(self, arms: Iterable[str], seconds: float) -> int:
        """The inverse of `seconds`: for how many examples they suffice; 0 or less if not even for validation."""
        rate = self.overhead * self.epochs * sum(self._rate(arm) for arm in arms)
        return int((seconds / rate - self.validation) / TRAINED)

    def _rate(self, arm: str) -> float:
        rates = {name: seconds / self.work(examples) for name, (examples, seconds) in self.measured.items()}
        return rates.get(arm, max(rates.values()))
