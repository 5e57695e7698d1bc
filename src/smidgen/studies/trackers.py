"""A study's runs in an experiment tracker, through Accelerate's: one run there for each run here, the curve of its
validation metrics by epoch, and its test metrics and costs at the end."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from smidgen.common.atomic_files import read_json, write_files
from smidgen.common.errors import StudyError, nearest
from smidgen.studies.comparison.run_store import Result, RunStore

Options = Mapping[str, object]
TRACKED = "tracked.json"  # in a run's folder: tracker -> what of the run it has


def _in_folder(project: str, label: str, key: str, out: Path) -> Options:
    return {"run_name": f"{label}-{key}", "logging_dir": str(out / "tensorboard")}


def _in_project(project: str, label: str, key: str, out: Path) -> Options:
    return {"run_name": project, "name": f"{label}-{key}", "resume": "allow"}


def _by_id(project: str, label: str, key: str, out: Path) -> Options:
    return {"run_name": project, "name": label, "id": key, "resume": "allow", "dir": str(out)}


TRACKERS: dict[str, Callable[[str, str, str, Path], Options]] = {
    "tensorboard": _in_folder, "trackio": _in_project, "wandb": _by_id,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class StudyTracker:
    """Logs results as they come, each once, also over several calls.

    Attributes:
        name: of the tracker.
        project: of the study.
        out: where trackers that write files write.
    """

    name: str
    project: str
    store: RunStore
    out: Path

    @classmethod
    def named(cls, name: str, project: str, store: RunStore) -> StudyTracker:
        """By a tracker's name. Raises StudyError if there is none of it, or its package is missing."""
        if name not in TRACKERS:
            raise StudyError(f"no tracker {name!r}; there are {', '.join(TRACKERS)}{nearest(name, TRACKERS)}")
        if name not in [str(found) for found in get_available_trackers()]:
            raise StudyError(f"tracker {name!r} needs its package: pip install {name}")
        PartialState()
        return cls(name, project, store, store.path)

    def told(self, result: Result) -> None:
        """Log a run's validation metrics, epoch by epoch."""
        curve = {epoch: _named("validation", scores) for epoch, scores in enumerate(result.scores, 1)}
        self._log(result, "validation", curve)

    def tested(self, results: Sequence[Result]) -> None:
        """Log test metrics and costs of those that have them."""
        for result in results:
            if result.test is not None:
                last = max(1, len(result.scores))
                self._log(result, "test", {last: _named("test", result.test) | _named("cost", result.costs)})

    def _log(self, result: Result, part: str, values: Mapping[int, Mapping[str, float]]) -> None:
        """Log a part of a run, unless it is there."""
        folder = self.store.folder(result.key)
        known = read_json(folder / TRACKED) if (folder / TRACKED).is_file() else {}
        parts = known.get(self.name, [])
        if part in parts:
            return
        label = f"{result.arm}-{result.task}-{result.examples or 'all'}-lr{result.lr:g}-seed{result.seed}"
        label = "".join(c if c.isalnum() or c in ".-" else "_" for c in label)
        options = TRACKERS[self.name](self.project, label, result.key, self.out)
        tracker: GeneralTracker = LOGGER_TYPE_TO_CLASS[self.name](**options)
        tracker.start()
        if not parts:
            tracker.store_init_configuration(_configuration(result))
        for step, numbers in values.items():
            tracker.log(dict(numbers), step=step)
        tracker.finish()
        known[self.name] = [*parts, part]
        write_files(folder, {TRACKED: json.dumps(known).encode()})


def _named(group: str, values: Mapping[str, float | None]) -> dict[str, float]:
    """Values that are numbers, under "group/name"."""
    return {
        f"{group}/{name}": float(value) for name, value in values.items() if value is not None and math.isfinite(value)
    }


def _configuration(result: Result) -> dict[str, str | int | float]:
    """What a run is, as trackers take it."""
    return {
        "model": os.path.basename(result.model), "task": result.task, "examples": result.examples or "all",
        "arm": result.arm, "recipe": result.recipe, "seed": result.seed, result.rate: result.lr,
        "failed": result.error or "",
    }  # fmt: skip
