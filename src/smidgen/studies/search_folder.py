"""A search's folder: search.json, each trial's own run, and at the end the best delta."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from smidgen.common.atomic_files import read_json, write_files
from smidgen.common.errors import DeltaError, TrainError
from smidgen.delta.delta import Delta
from smidgen.studies.trial import Search, Trial
from smidgen.training.run.run_folder import check_same
from smidgen.training.run.settings import Settings

FILE, FOLDER = "search.json", "trials"


class Ledger:
    """The trials that are done, in a folder or in memory, and their deltas.

    search.json is replaced by a rename as each trial ends, so that a search killed at any moment goes on with the
    trials that are left.
    """

    def __init__(self, out: str | os.PathLike[str] | None, asked: Mapping[str, object]) -> None:
        """Open or begin. Raises TrainError if the folder holds another search, or something else."""
        self.path = None if out is None else Path(out)
        self.asked, self.trials = asked, list[Trial]()
        self._deltas: list[Delta | None] = []
        if self.path is not None:
            self._open(self.path)

    def _open(self, path: Path) -> None:
        """Take up what the folder holds of the same search; refuse any other content."""
        if path.exists() and not path.is_dir():
            raise TrainError(f"{path} is a file, not a folder")
        if (path / FOLDER).exists() and (path / FILE).is_file():
            record = read_json(path / FILE)
            check_same(path, record.get("asked", {}), self.asked)
            try:
                self.trials = [Trial.from_json(entry) for entry in record["trials"]]
            except (TypeError, KeyError) as error:
                raise DeltaError(f"{path / FILE} is damaged: {error}") from None
        elif path.is_dir() and any(not p.name.startswith(".") and p.name != FILE for p in path.iterdir()):
            raise TrainError(f"{path} is not empty and holds no search of smidgen; choose another --out")
        else:  # new, or stopped by a mistake before the first trial began
            self._write({"trials": []})

    def folder(self, rate: str, settings: Settings) -> Path | None:
        """Where a trial has its own run."""
        name = f"{rate}-{getattr(settings, rate)!r}-seed-{settings.seed}"
        return None if self.path is None else self.path / FOLDER / name

    def add(self, trial: Trial, delta: Delta | None) -> None:
        """A trial is done; `delta` is None if it diverged."""
        self.trials.append(trial)
        self._deltas.append(delta if self.path is None else None)
        self._write({"trials": [asdict(each) for each in self.trials]})

    def finish(self, found: Search, folder: Path | None) -> Search:
        """The search with the delta of its best trial, which is in `folder`, and then beside search.json too."""
        if self.path is None or folder is None:
            return replace(found, delta=self._deltas[found.trials.index(found.best)])
        delta = Delta.load(folder)
        delta.save(self.path)
        self._write(found.to_json())
        for path in self.path.glob("prefix-*.states"):
            path.unlink(missing_ok=True)  # hidden states are of no more use
        return replace(found, delta=delta)

    def _write(self, content: Mapping[str, object]) -> None:
        if self.path is not None:
            text = json.dumps({"asked": self.asked, **content}, indent=1)
            write_files(self.path, {FILE: text.encode()})
