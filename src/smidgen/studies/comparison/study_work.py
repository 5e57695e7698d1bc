"""StudyWork: runs of one arm that differ in rate and seed, each seed with its own examples and head."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smidgen.common.atomic_files import write_files
from smidgen.common.errors import SmidgenError, WriteError
from smidgen.data.task import Task
from smidgen.delta.delta import Delta
from smidgen.efficiency.prefix_cache.shared_caches import Kept
from smidgen.recipe.recipe import Recipe
from smidgen.studies.comparison.efficiency_meter import EfficiencyMeter
from smidgen.studies.runners.work import Work
from smidgen.studies.trial import Trial
from smidgen.training.run.settings import Settings

METER = "efficiency.json"


@dataclass(frozen=True, eq=False)
class StudyWork(Work):
    """What the runs of an arm have in common.

    Attributes:
        tasks: seed -> the task with that seed's examples.
        recipes: seed -> the recipe with what that seed draws.
        heads: seed -> name of a parameter of the model -> what it starts from.
    """

    tasks: Mapping[int, Task]
    recipes: Mapping[int, Recipe]
    heads: Mapping[int, Mapping[str, Tensor]]

    def run(
        self, settings: Settings, out: Path | None, progress: bool | None, kept: Kept
    ) -> tuple[Trial, Delta | None]:
        """One run, measured; whatever ends it but an interrupt or a full disk ends it alone."""
        begun = time.perf_counter()
        with torch.no_grad():
            for name, value in self.heads[settings.seed].items():
                self.model.get_parameter(name).copy_(value)
        own = Work(
            self.model, self.recipes[settings.seed], self.tasks[settings.seed], self.objective, self.processor,
            self.rate, self.epochs, self.folder,
        )  # fmt: skip
        try:
            with EfficiencyMeter() as meter:
                trial, delta = own.run(settings, out, progress, kept)
        except WriteError:  # a full disk is no fault of this run, and would be one of all to come
            raise
        except (SmidgenError, RuntimeError, MemoryError, NotImplementedError) as error:
            said = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            seconds = time.perf_counter() - begun
            return Trial(getattr(settings, self.rate), settings.seed, (), None, seconds, said, failed=True), None
        if out is not None and not (out.parent / METER).is_file():  # a finished run that is read again took no time
            write_files(out.parent, {METER: json.dumps(meter.to_json()).encode()})
        return trial, delta

    def lost(self, settings: Settings, why: str) -> Trial:
        """A run that failed; the others go on."""
        return Trial(getattr(settings, self.rate), settings.seed, (), None, 0.0, why, failed=True)
