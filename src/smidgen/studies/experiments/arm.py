"""One arm of a comparison: train with what was selected, score on a split, keep the numbers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypedDict, cast

from torch import nn

from smidgen.data.processor import Processor
from smidgen.data.task import Task
from smidgen.delta.fingerprint import Fingerprint
from smidgen.delta.saved_selection import Selection
from smidgen.inference.evaluation import evaluate
from smidgen.recipe.recipe import Recipe
from smidgen.studies.run_folders import RunFolders, key_of
from smidgen.training.fitting import fit
from smidgen.training.run.settings import SettingsOptions, UnseededOptions

RESULT = "result.json"


class Outcome(TypedDict):
    """What one run came to: `value` is its metric, more is better or not as the metric has it."""

    task: str
    arm: str
    seed: int
    metric: str
    value: float
    scores: dict[str, float]
    trained: int
    head_values: int
    seconds: float


@dataclass(frozen=True)
class Bench:
    """What is the same in all arms of one task and seed: base, task, settings, and where numbers are kept.

    Attributes:
        split: what is scored; training looks at train and validation only.
        folder: for finished runs, so that the same call goes on where it stopped; None keeps nothing.
    """

    model: nn.Module
    processor: Processor
    task: Task
    seed: int
    settings: UnseededOptions
    split: str = "test"
    folder: Path | None = None

    def run(self, arm: str, recipe: Recipe, selection: Selection | None = None) -> Outcome:
        """Train and score, or read the numbers of an earlier, equal run."""
        kept = None if self.folder is None else RunFolders(self.folder)
        key = self._key(recipe, selection)
        record = None if kept is None else kept.read(key, RESULT)
        if record is not None:
            return cast(Outcome, {**record["outcome"], "arm": arm})
        outcome = self._train(arm, recipe, selection)
        if kept is not None:
            kept.write(key, {RESULT: {"outcome": outcome}})
        return outcome

    @cached_property
    def _base(self) -> str:
        """Digest of all weights, those of a fresh head too."""
        return Fingerprint.of(self.model, ()).values

    def _key(self, recipe: Recipe, selection: Selection | None) -> str:
        chosen = None if selection is None else selection.digest
        same = {"settings": dict(self.settings), "seed": self.seed, "split": self.split}
        data = {"task": self.task.name, "data": self.task.fingerprint, "metric": self.task.metric}
        return key_of({"base": self._base, "recipe": recipe.to_json(), "selection": chosen, **data, **same})

    def _train(self, arm: str, recipe: Recipe, selection: Selection | None) -> Outcome:
        """One training run and its scores, as a record of plain values."""
        begin = time.perf_counter()
        options: SettingsOptions = {"seed": self.seed, **self.settings}
        delta = fit(self.model, recipe, self.task, selection=selection, processor=self.processor, **options)
        seconds = time.perf_counter() - begin
        scores = evaluate(self.model, self.task, delta=delta, split=self.split, processor=self.processor)
        return {
            "task": self.task.name,
            "arm": arm,
            "seed": self.seed,
            "metric": scores.metric,
            "value": scores.value,
            "scores": scores.values,
            "trained": delta.trained,
            "head_values": delta.head_values,
            "seconds": round(seconds, 2),
        }
