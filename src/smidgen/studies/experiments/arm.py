"""One arm of a comparison: train with what was selected, score on a split, keep the numbers."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from torch import nn

from smidgen.common.atomic_files import read_json, write_files
from smidgen.common.errors import DataError
from smidgen.data.processor import Processor
from smidgen.data.task import Task
from smidgen.delta.saved_selection import Selection
from smidgen.inference.evaluation import evaluate
from smidgen.recipe.recipe import Recipe
from smidgen.training.fitting import fit
from smidgen.training.run.settings import SettingsOptions, UnseededOptions


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
        """Train and score, or read the numbers of an earlier, equal run.
        Raises:
            DataError: the folder holds a run of other settings.
        """
        asked = self._asked(arm, recipe, selection)
        path = None if self.folder is None else self.folder / f"{slug(self.task.name)}-{slug(arm)}-{self.seed}.json"
        if path is not None and path.is_file():
            saved = read_json(path)
            if saved.get("asked") != json.loads(json.dumps(asked)):
                raise DataError(f"{path} is of other data or settings; choose another folder, or remove it")
            found: Outcome = saved["outcome"]
            return found
        outcome = self._train(arm, recipe, selection)
        if path is not None:
            content = json.dumps({"asked": asked, "outcome": outcome}, indent=1)
            write_files(path.parent, {path.name: content.encode()})
        return outcome

    def _asked(self, arm: str, recipe: Recipe, selection: Selection | None) -> dict[str, object]:
        kept = None if selection is None else selection.digest
        asked = {"arm": arm, "recipe": recipe.to_json(), "selection": kept, "data": self.task.fingerprint}
        return {**asked, "settings": dict(self.settings), "seed": self.seed, "split": self.split}

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


def slug(text: str) -> str:
    """Text as part of a file's name."""
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in text)
