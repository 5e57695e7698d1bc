"""What a search found: its trials, the best of them, and a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from smidgen.common.json_numbers import restored
from smidgen.data.metrics import METRICS
from smidgen.delta.delta import Delta
from smidgen.recipe.recipe import Recipe


@dataclass(frozen=True)
class Trial:
    """One run of `fit` within a search.

    Attributes:
        lr: the rate that was tried.
        seed: of the run.
        scores: for each epoch, metric name -> number on the validation split.
        best_epoch: counted from 1; None if the trial diverged.
        seconds: that it took, since it was last started.
        error: the line that says where the loss was not finite any more, or why it failed otherwise; None for a trial
            that came to its end.
        failed: it failed otherwise than by a loss that is not finite.
    """

    lr: float
    seed: int
    scores: tuple[Mapping[str, float], ...]
    best_epoch: int | None
    seconds: float
    error: str | None = None
    failed: bool = False

    def value(self, metric: str) -> float | None:
        """The metric at the best epoch; None if the trial diverged."""
        return None if self.best_epoch is None else self.scores[self.best_epoch - 1][metric]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        """The inverse of `dataclasses.asdict`, also after JSON."""
        scores = tuple({name: restored(value) for name, value in entry.items()} for entry in data["scores"])
        return cls(**{**data, "scores": scores})


@dataclass(frozen=True, eq=False)
class Search:
    """The trials of one recipe on one task.

    Attributes:
        recipe: what was trained.
        task: name of the task.
        metric: name of the metric that counts.
        rate: which setting was tried: "lr", or "head_lr" for a recipe that trains the head alone.
        trials: in order: rate by rate, seed by seed.
        delta: of the best trial.
    """

    recipe: Recipe
    task: str
    metric: str
    rate: str
    trials: tuple[Trial, ...]
    delta: Delta | None = field(default=None, repr=False)

    @property
    def best(self) -> Trial:
        """The best seed of the rate whose mean over seeds is best; the earlier one of equals."""
        means = {lr: fmean(self._better(t) for t in self.trials if t.lr == lr) for lr in self.rates}
        rate = max(means, key=lambda lr: means[lr])
        return max((t for t in self.trials if t.lr == rate), key=self._better)

    @property
    def rates(self) -> tuple[float, ...]:
        """The rates that were tried, in order."""
        return tuple(dict.fromkeys(trial.lr for trial in self.trials))

    @property
    def edge(self) -> str | None:
        """ "lowest" or "highest" if the best of several rates lies at an end of them: better ones may lie beyond."""
        low, high, best = min(self.rates), max(self.rates), self.best.lr
        return None if low == high or low < best < high else "lowest" if best == low else "highest"

    def rows(self) -> list[tuple[str, ...]]:
        """A header and a row for each trial, as text: rate, seed, metric, epoch, seconds, mark."""
        best = self.best
        found: list[tuple[str, ...]] = [(self.rate, "seed", self.metric, "epoch", "seconds", "")]
        for trial in self.trials:
            value = trial.value(self.metric)
            shown = ("-", "-") if value is None else (f"{value:.4f}", str(trial.best_epoch))
            mark = "best" if trial is best else "diverged" if trial.error else ""
            found.append((f"{trial.lr:g}", str(trial.seed), *shown, f"{trial.seconds:.1f}", mark))
        return found

    def table(self) -> str:
        """The trials as text, one on a line, the best marked."""
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        lines = ["  ".join([*map(str.rjust, row, widths), row[-1]]).rstrip() for row in rows]
        return "\n".join([f"{self.recipe} on {self.task}: {self.metric} on validation", *lines])

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> dict[str, object]:
        """Plain data: the trials, the best, and whether it lies at an edge of the rates."""
        said = {"recipe": str(self.recipe), "task": self.task, "metric": self.metric, "rate": self.rate}
        best = {**asdict(self.best), self.metric: self.best.value(self.metric)}
        return {**said, "trials": [asdict(trial) for trial in self.trials], "best": best, "edge": self.edge}

    def _better(self, trial: Trial) -> float:
        """The metric, turned so that more is better; a trial that diverged is worst."""
        value = trial.value(self.metric)
        if value is None or math.isnan(value):
            return -math.inf
        return value if METRICS[self.metric].higher_is_better else -value
