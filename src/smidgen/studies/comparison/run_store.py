"""A study's folder: what the study is, and the results and answers of its runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Self

from smidgen.common.atomic_files import read_json
from smidgen.common.errors import StudyError
from smidgen.studies.run_folders import FIT, FORMAT, RUNS, RunFolders, write_json
from smidgen.studies.study_place import StudyPlace

LARGE = 2**24  # bytes of a delta
STUDY, RESULT, TEST = "study.json", "result.json", "test.json"


@dataclass(frozen=True)
class Result:
    """One run: where it stands in the grid, and what came of it.

    Attributes:
        examples: it learned from; None for all.
        lr: its rate; `rate` is the setting's name, "lr" or "head_lr".
        validation: the task's metric at the best epoch; None if the run failed.
        scores: of each epoch, metric -> number on the validation split.
        costs: name -> number, what the run took; None where it was not measured.
        test: metric -> number on the test split; None if its arm's rate is another.
        error: why it failed, in one line.
        diverged: it failed because the loss was not finite any more, so that another try would fail too.
    """

    key: str
    model: str
    task: str
    metric: str
    examples: int | None
    arm: str
    recipe: str
    seed: int
    rate: str
    lr: float
    validation: float | None = None
    scores: tuple[Mapping[str, float], ...] = ()
    best_epoch: int | None = None
    costs: Mapping[str, float | None] = field(default_factory=dict)
    test: Mapping[str, float] | None = None
    error: str | None = None
    diverged: bool = False

    @property
    def cell(self) -> tuple[str, str, int | None]:
        """Where arms are compared: model, task, number of examples."""
        return self.model, self.task, self.examples

    @property
    def over(self) -> bool:
        """Whether another try would give nothing else."""
        return self.error is None or self.diverged

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Self:
        """The inverse of `dataclasses.asdict`, also after JSON."""
        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        return cls(**{**known, "scores": tuple(known.get("scores", ()))})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Examples:
    """What a run said of each example of the test split, and what is right there."""

    predictions: Sequence[object]
    references: Sequence[object]

    @property
    def right(self) -> list[bool]:
        """Which answers are what is right."""
        return [said == right for said, right in zip(self.predictions, self.references, strict=True)]


class RunStore(RunFolders):
    """Runs of a study in a folder, or behind a URL (see `StudyPlace`)."""

    def __init__(self, out: str | os.PathLike[str]) -> None:
        """Open or begin. Raises StudyError if the folder holds something else, or a study of another format."""
        self.place = StudyPlace(out)
        super().__init__(self.place.folder)
        self.place.fetch(STUDY)
        if self.path.exists() and not self.path.is_dir():
            raise StudyError(f"{self.path} is a file, not a folder")
        record = self.path / STUDY
        if record.is_file():
            found = read_json(record).get("format")
            if found != FORMAT:
                raise StudyError(f"{record} is of format {found}, this version writes {FORMAT}; choose another --out")
        elif self.path.is_dir() and any(not p.name.startswith(".") for p in self.path.iterdir()):
            raise StudyError(f"{self.path} is not empty and holds no study of smidgen; choose another --out")

    def begin(self, study: Mapping[str, object]) -> None:
        """Write down what the study is; what writes that were killed left half goes."""
        self.tidy()
        write_json(self.path, {STUDY: {"format": FORMAT, "study": dict(study)}})
        done = [key for key in self.keys() if (self.folder(key) / RESULT).is_file()]
        self.place.send([STUDY, *(f"{RUNS}/{key}" for key in done)])  # also what was kept and not sent any more

    def study(self) -> dict[str, object]:
        """What the study is. Raises StudyError if the folder holds none."""
        if not (self.path / STUDY).is_file():
            raise StudyError(f"{self.place.said} holds no study; smidgen compare makes one")
        found: dict[str, object] = read_json(self.path / STUDY)["study"]
        return found

    def result(self, key: str) -> Result | None:
        """What came of a run; None if it has not come to an end."""
        found = self.read(key, RESULT)
        return None if found is None else Result.from_json(found)

    def keep(self, result: Result, said: Examples | None = None) -> None:
        """Write down what came of a run, and what it said of the test split."""
        if said is not None:
            self.write(result.key, {TEST: asdict(said)})
        self.write(result.key, {RESULT: asdict(result)})
        self.place.send([f"{RUNS}/{result.key}"])

    def examples(self, key: str) -> Examples | None:
        """What a run said of each example of the test split."""
        found = self.read(key, TEST)
        return None if found is None else Examples(found["predictions"], found["references"])

    def drop_large(self, key: str) -> None:
        """Remove the delta of a run that is over if it is large (full fine-tuning); its results stay."""
        file = self.fit(key) / "delta.safetensors"
        if file.is_file() and file.stat().st_size > LARGE:
            shutil.rmtree(self.fit(key))
            self.place.remove(f"{RUNS}/{key}/{FIT}")

    def results(self) -> list[Result]:
        """All runs that came to an end, also such as an earlier form of the study asked for."""
        found = (self.result(key) for key in self.keys())
        return [result for result in found if result is not None]
