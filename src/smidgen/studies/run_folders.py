"""RunFolders: the runs of a search, a comparison or an analysis, each under the hash of all that determines it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smidgen.common.atomic_files import read_json, write_files
from smidgen.common.json_numbers import plain

RUNS, FIT = "runs", "fit"
FORMAT = 1


class RunFolders:
    """`OUT/runs/KEY/` for each run: small JSON files, and the run of `fit` itself in `fit/`.

    What a run was asked to be is its key, so equal runs are made once, and runs of other settings lie beside them.
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        self.path = Path(out)

    def folder(self, key: str) -> Path:
        """A run's folder."""
        return self.path / RUNS / key

    def fit(self, key: str) -> Path:
        """Where `fit` keeps its own record, checkpoint and delta."""
        return self.folder(key) / FIT

    def keys(self) -> list[str]:
        """Of all runs that were begun."""
        return sorted(path.name for path in (self.path / RUNS).glob("*"))

    def read(self, key: str, name: str) -> dict[str, Any] | None:
        """One of a run's JSON files; None if it is not there."""
        path = self.folder(key) / name
        return read_json(path) if path.is_file() else None

    def write(self, key: str, files: Mapping[str, Mapping[str, object]]) -> None:
        """JSON files of a run, each whole or not at all. Raises WriteError if the disk is full."""
        write_json(self.folder(key), files)

    def tidy(self) -> None:
        """Remove what writes that were killed left half."""
        for part in (self.path / RUNS).rglob(".part-*"):
            part.unlink(missing_ok=True)


def write_json(folder: Path, files: Mapping[str, Mapping[str, object]]) -> None:
    """JSON files in a folder, each whole or not at all; numbers that JSON lacks as null."""
    write_files(folder, {name: json.dumps(plain(value), indent=1).encode() for name, value in files.items()})


def key_of(determines: Mapping[str, object]) -> str:
    """Sixteen hexadecimal digits of all that determines a run, plain data."""
    text = json.dumps({"format": FORMAT, **determines}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
