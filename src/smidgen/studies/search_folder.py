"""A search's folder: search.json, each trial's own run, and at the end the best delta."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from smidgen.common.atomic_files import read_json
from smidgen.common.errors import DeltaError, TrainError
from smidgen.delta.delta import Delta
from smidgen.studies.run_folders import RunFolders, key_of, write_json
from smidgen.studies.trial import Search, Trial
from smidgen.training.run.run_folder import check_same
from smidgen.training.run.settings import Settings

FILE, TRIAL = "search.json", "trial.json"


class Ledger:
    """The trials that are done, in a folder or in memory, and their deltas.

    A trial's record is written as it ends, under the hash of all that determines it. A search killed at any moment goes
    on with the trials that are left, and one with further rates or seeds makes only those.
    """

    def __init__(self, out: str | os.PathLike[str] | None, asked: Mapping[str, object], rate: str) -> None:
        """Open or begin. `asked`: what all trials have in common; `rate`: the setting that is tried.

        Raises:
            TrainError: the folder holds another search, or something else.
        """
        self.asked, self.rate = asked, rate
        self.path = None if out is None else Path(out)
        self._folders = None if out is None else RunFolders(out)
        self._trials: dict[str, Trial] = {}
        self._deltas: dict[str, Delta | None] = {}
        if self.path is not None:
            self._open(self.path)

    def _open(self, path: Path) -> None:
        """Check that the folder is of the same search, or new; refuse any other content."""
        if path.exists() and not path.is_dir():
            raise TrainError(f"{path} is a file, not a folder")
        record = read_json(path / FILE) if (path / FILE).is_file() else {}
        if (path / "trials").is_dir():
            raise TrainError(f"{path} holds a search of an earlier version of smidgen; choose another --out")
        if record and any(RunFolders(path).keys()):
            check_same(path, record.get("asked", {}), self.asked)
        elif path.is_dir() and any(not p.name.startswith(".") and p.name != FILE for p in path.iterdir()):
            raise TrainError(f"{path} is not empty and holds no search of smidgen; choose another --out")
        else:  # new, or stopped by a mistake before the first trial began
            self._write({"trials": []})

    def _key(self, settings: Settings) -> str:
        return key_of({**self.asked, "rate": getattr(settings, self.rate), "seed": settings.seed})

    def folder(self, settings: Settings) -> Path | None:
        """Where a trial has its own run."""
        return None if self._folders is None else self._folders.fit(self._key(settings))

    def trial(self, settings: Settings) -> Trial | None:
        """What came of a trial; None if it has not come to an end."""
        key = self._key(settings)
        if key not in self._trials and self._folders is not None:
            record = self._folders.read(key, TRIAL)
            if record is not None:
                try:
                    self._trials[key] = Trial.from_json(record)
                except (TypeError, KeyError) as error:
                    raise DeltaError(f"{self._folders.folder(key) / TRIAL} is damaged: {error}") from None
        return self._trials.get(key)

    def add(self, settings: Settings, trial: Trial, delta: Delta | None) -> None:
        """A trial is done; `delta` is None if it diverged."""
        key = self._key(settings)
        self._trials[key] = trial
        if self._folders is None:
            self._deltas[key] = delta
        else:
            self._folders.write(key, {TRIAL: asdict(trial)})

    def written(self, trials: Sequence[Trial]) -> None:
        """Say in search.json how far this search is."""
        self._write({"trials": [asdict(each) for each in trials]})

    def finish(self, found: Search, best: Settings) -> Search:
        """The search with the delta of its best trial, which comes to lie beside search.json too."""
        folder = self.folder(best)
        if self.path is None or folder is None:
            return replace(found, delta=self._deltas[self._key(best)])
        delta = Delta.load(folder)
        delta.save(self.path)
        self._write(found.to_json())
        for path in self.path.glob("prefix-*.states"):
            path.unlink(missing_ok=True)  # hidden states are of no more use
        return replace(found, delta=delta)

    def _write(self, content: Mapping[str, object]) -> None:
        if self.path is not None:
            write_json(self.path, {FILE: {"asked": self.asked, **content}})
