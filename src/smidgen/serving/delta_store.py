"""Where deltas lie: a folder of folders, on the disk or at any URL that fsspec knows (s3://, gs://, memory://, ...)."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from smidgen.common.atomic_files import read_json
from smidgen.common.errors import DeltaError, WriteError
from smidgen.delta.delta import CARD, META, TENSORS, Delta
from smidgen.serving.errors import ServingError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
BASE = "base"
FILES = (TENSORS, CARD, META)  # the last one makes them a delta


def check_name(name: object) -> str:
    """A delta's name: 1 to 128 letters, digits, `.`, `_`, `-`, the first a letter or a digit.

    Raises:
        ServingError: it is none, or the base's.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ServingError(
            f"{str(name)[:40]!r} is no name for a delta: up to 128 letters, digits, '.', '_' and '-', "
            "the first a letter or a digit"
        )
    if name == BASE:
        raise ServingError(f"{BASE!r} is the untouched base; give the delta another name")
    return name


class DeltaStore:
    """Deltas by name in one place, each in a folder of its own.

    Args:
        place: a folder, or a URL of fsspec.

    Raises:
        ServingError: there is no such folder, or its protocol is unknown.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.place = os.fspath(place)
        try:
            fs, root = fsspec.core.url_to_fs(self.place)
        except (ValueError, ImportError, OSError) as error:
            raise ServingError(f"{self.place} cannot be opened: {error}") from None
        self.fs: Any = fs
        self.root: str = root
        if not self.fs.isdir(self.root):
            raise ServingError(f"{self.place} is no folder; give one that holds deltas, each in a folder of its own")

    @property
    def local(self) -> bool:
        """Whether it is on the disk."""
        return isinstance(self.fs, LocalFileSystem)

    def names(self) -> list[str]:
        """All deltas that are there now, sorted."""
        self.fs.invalidate_cache(self.root)
        found = (str(path).rstrip("/").rpartition("/")[2] for path in self.fs.ls(self.root, detail=False))
        return sorted(name for name in found if NAME.fullmatch(name) and self.has(name))

    def has(self, name: str) -> bool:
        """Whether a delta of this name is there."""
        return bool(NAME.fullmatch(name)) and bool(self.fs.exists(f"{self.root}/{name}/{META}"))

    def record(self, name: str) -> dict[str, object]:
        """A delta's JSON, without its values. Raises DeltaError if it is damaged or was taken away."""
        if self.local:
            return read_json(Path(self.root, name, META))
        with tempfile.TemporaryDirectory() as copy:
            try:
                self.fs.get_file(f"{self.root}/{name}/{META}", f"{copy}/{META}")
            except FileNotFoundError:
                raise DeltaError(f"{self.place}/{name} holds no delta: {META} is missing") from None
            return read_json(Path(copy, META))

    def version(self, name: str) -> tuple[object, ...]:
        """What tells one state of a delta's file from another; () if there is none, a moment later neither.

        Where a delta is replaced there is none for a moment.
        """
        for wait in (0.005, 0.02, 0.0):
            if found := self._version(name):
                return found
            time.sleep(wait)
        return ()

    def _version(self, name: str) -> tuple[object, ...]:
        """As it is just now."""
        found = []
        for file in (META, TENSORS):
            try:
                info = self.fs.info(f"{self.root}/{name}/{file}")
            except FileNotFoundError:
                return ()
            found += [info.get(key) for key in ("size", "mtime", "ino", "ETag", "LastModified", "created")]
        return tuple(found)

    def load(self, name: str) -> Delta:
        """Read a delta. Raises DeltaError if it is damaged or was taken away."""
        folder = f"{self.root}/{name}"
        if self.local:
            return Delta.load(Path(folder))
        with tempfile.TemporaryDirectory() as copy:
            for file in (META, TENSORS):
                try:
                    self.fs.get_file(f"{folder}/{file}", f"{copy}/{file}")
                except FileNotFoundError:
                    raise DeltaError(f"{self.place}/{name} holds no delta: {file} is missing") from None
            return Delta.load(copy)

    def save(self, name: str, delta: Delta) -> None:
        """Write a delta, whole or not at all, in the place of one of the same name.

        Raises:
            WriteError: the disk is full, or the folder cannot be written; what was there stays.
        """
        try:
            if self.local:
                with self._beside(name) as fresh:
                    delta.save(fresh)
            else:
                self._upload(f"{self.root}/{name}", delta)
        except (OSError, WriteError) as error:  # the latter names a folder that is gone by now
            reason = str(error).rpartition(": ")[2] if isinstance(error, WriteError) else error.strerror or error
            raise WriteError(f"cannot write to {self.place}: {reason}") from None

    def _upload(self, folder: str, delta: Delta) -> None:
        """Put a delta where there are no folders to rename: after an error what was there is put back."""
        with tempfile.TemporaryDirectory() as fresh, tempfile.TemporaryDirectory() as old:
            delta.save(fresh)
            kept = [file for file in FILES if self.fs.exists(f"{folder}/{file}")]
            for file in kept:
                self.fs.get_file(f"{folder}/{file}", f"{old}/{file}")
            self.fs.makedirs(folder, exist_ok=True)
            try:
                for file in FILES:
                    self.fs.put_file(f"{fresh}/{file}", f"{folder}/{file}")
            except BaseException as error:
                self._put_back(folder, old, kept, error)
                raise

    def _put_back(self, folder: str, old: str, kept: Sequence[str], error: BaseException) -> None:
        """Bring a folder back to the files that were kept of it. Raises OSError if that fails as well."""
        try:
            if not kept:
                self.fs.rm(folder, recursive=True)
                return
            for file in FILES:  # first of all, to make room
                if self.fs.exists(f"{folder}/{file}"):
                    self.fs.rm_file(f"{folder}/{file}")
            for file in kept:
                self.fs.put_file(f"{old}/{file}", f"{folder}/{file}")
        except OSError as second:
            raise OSError(f"{error}; and what was there could not be put back ({second})") from None

    @contextmanager
    def _beside(self, name: str) -> Iterator[str]:
        """A folder beside a delta's, which takes its place at the end; nothing is left of it after an error."""
        final = f"{self.root}/{name}"
        fresh = tempfile.mkdtemp(prefix=f".{name}.", dir=self.root)
        old = f"{fresh}.old"
        try:
            yield fresh
            if os.path.isdir(final):
                os.rename(final, old)
            os.rename(fresh, final)
        except BaseException:
            if os.path.isdir(old) and not os.path.isdir(final):
                os.rename(old, final)
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Take a delta away; at no moment is a part of it there."""
        if not self.has(name):
            return
        final = f"{self.root}/{name}"
        if self.local:
            gone = tempfile.mkdtemp(prefix=f".{name}.", dir=self.root)
            os.rename(final, gone)
            shutil.rmtree(gone)
        else:
            self.fs.rm(f"{final}/{META}")
            self.fs.rm(final, recursive=True)
