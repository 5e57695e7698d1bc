"""Work: what the trials of a search have in common."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from smidgen.common.errors import DivergedError, TrainError
from smidgen.data.processor import Processor
from smidgen.data.task import Task
from smidgen.delta.delta import Delta
from smidgen.efficiency.prefix_cache.shared_caches import Kept
from smidgen.recipe.recipe import Recipe
from smidgen.steps.objectives import Objective
from smidgen.studies.trial import Trial
from smidgen.training.run.loop import Loop
from smidgen.training.run.run_spec import RunSpec
from smidgen.training.run.settings import Settings

Todo = Sequence[tuple[Settings, Path | None]]


@dataclass(frozen=True, eq=False)
class Work:
    """What the trials of a search have in common.

    Attributes:
        rate: the setting that is tried, "lr" or "head_lr".
        epochs: of all trials together.
        folder: for hidden states that are too large for memory.
    """

    model: nn.Module
    recipe: Recipe
    task: Task
    objective: Objective
    processor: Processor | None
    rate: str
    epochs: int
    folder: Path | None

    def kept(self) -> Kept:
        """For hidden states that the trials of one process share."""
        return Kept(self.epochs, self.folder)

    def run(
        self, settings: Settings, out: Path | None, progress: bool | None, kept: Kept
    ) -> tuple[Trial, Delta | None]:
        """One trial; a loss that is not finite any more ends it, not the search."""
        start, delta, error = time.perf_counter(), None, None
        spec = RunSpec(
            self.model,
            self.recipe,
            self.task,
            settings,
            self.objective,
            out=out,
            processor=self.processor,
            progress=progress,
            shared=kept,
        )
        loop = Loop(spec)
        try:
            delta = loop.fit()
        except DivergedError as diverged:
            error = str(diverged)
        scores = tuple(dict(entry.scores) for entry in loop.history())
        best = None if delta is None else delta.info["best_epoch"]
        lr, seconds = getattr(settings, self.rate), time.perf_counter() - start
        return Trial(lr, settings.seed, scores, best, seconds, error), delta

    def lost(self, settings: Settings, why: str) -> Trial:
        """What stands for a trial whose process dies each time that it is tried.

        Raises:
            TrainError: a search ends with it.
        """
        raise TrainError(
            f"the trial at {self.rate} {getattr(settings, self.rate):g}, seed {settings.seed}: {why}; with `out` the "
            "search goes on where it stopped"
        )
