"""StudyPlace: a folder of this machine, or any URL that fsspec knows (s3://, gs://, ...) with a working copy here."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smidgen.common.errors import StudyError, WriteError

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
JOINED = re.compile(r"[a-z][a-z0-9+.-]+:/[^/]")  # a path joins the slashes of a URL


class StudyPlace:
    """Where the files of a study lie.

    Behind a URL runs are made in a working copy on this machine, and each is sent as it ends: killed on one machine, a
    study goes on at another with the runs that are left. Nothing locks a URL: one machine at a time.

    Attributes:
        folder: of this machine: the study's own, or the working copy.
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        """Raises StudyError: the URL cannot be opened."""
        self.said = os.fspath(out)
        self._remote: Any = None
        if JOINED.match(self.said):
            raise StudyError(f"{self.said} is a URL that a path has joined; give it as text, with its two slashes")
        if not URL.match(self.said):
            self.folder = Path(out)
            return
        import fsspec

        try:
            self._remote, self._root = fsspec.core.url_to_fs(self.said)
        except (ImportError, ValueError, OSError) as error:  # of what is missing, fsspec's message names the package
            raise StudyError(f"{self.said} cannot be opened: {error}") from None
        self._root = self._root.rstrip("/")
        self.folder = _cache() / hashlib.sha256(self.said.rstrip("/").encode()).hexdigest()[:16]

    def fetch(self, mark: str) -> None:
        """Bring the working copy up to what lies at the URL. `mark`: a file without which there is no study there, so
        that an old working copy of it goes.

        Raises:
            StudyError: the URL cannot be read.
        """
        if self._remote is None:
            return
        try:
            self._remote.invalidate_cache()
            there = {str(path): int(info["size"]) for path, info in self._listed().items()}
            if mark not in there and self.folder.exists():
                shutil.rmtree(self.folder)
            for name, size in there.items():
                goal = self.folder / name
                if not goal.is_file() or goal.stat().st_size != size:
                    goal.parent.mkdir(parents=True, exist_ok=True)
                    self._remote.get_file(f"{self._root}/{name}", str(goal))
        except OSError as error:
            raise StudyError(f"{self.said} cannot be read: {error}") from None

    def _listed(self) -> dict[str, Any]:
        """Path below the URL -> fsspec's record of it."""
        if not self._remote.exists(self._root):
            return {}
        found = self._remote.find(self._root, detail=True)
        return {path.removeprefix(self._remote._strip_protocol(self._root)).strip("/"): i for path, i in found.items()}

    def send(self, names: Iterable[str]) -> None:
        """Files, or folders with all that is in them, as they are now in the working copy.

        Raises:
            WriteError: they cannot be written there.
        """
        if self._remote is None:
            return
        try:
            for name in names:
                path = self.folder / name
                for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                    if file.is_file() and not file.name.startswith("."):
                        goal = f"{self._root}/{file.relative_to(self.folder).as_posix()}"
                        self._remote.makedirs(goal.rpartition("/")[0], exist_ok=True)
                        self._remote.put_file(str(file), goal)
        except OSError as error:
            raise WriteError(f"cannot write to {self.said}: {error}") from None

    def remove(self, name: str) -> None:
        """A folder that is gone from the working copy."""
        try:
            if self._remote is not None and self._remote.exists(f"{self._root}/{name}"):
                self._remote.rm(f"{self._root}/{name}", recursive=True)
        except OSError as error:
            raise WriteError(f"cannot write to {self.said}: {error}") from None


def _cache() -> Path:
    """Where working copies lie: XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smidgen" / "studies"
