"""MediaFile: an image or a sound as a file holds it, read where it is needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from datasets import Features, Value

from smidgen.common.errors import DataError

CELL = Features({"bytes": Value("binary"), "path": Value("string")})  # as datasets keeps images and sounds


@dataclass(frozen=True)
class MediaFile:
    """Bytes, or the path of a file that has them.

    Attributes:
        name: for messages.
        data: the bytes; None to read `path`.
    """

    name: str
    data: bytes | None = None
    path: str | None = None

    @classmethod
    def of(cls, value: object, name: str = "an input") -> MediaFile:
        """From a path, bytes, or a cell of a column {"bytes", "path"}.

        Raises:
            DataError: it is none of them.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str | os.PathLike):
            return cls(os.fspath(value), None, os.fspath(value))
        if isinstance(value, bytes):
            return cls(name, value)
        if isinstance(value, Mapping) and (value.get("bytes") is not None or value.get("path")):
            return cls(str(value.get("path") or name), value.get("bytes"), value.get("path"))
        raise DataError(f"{name} is {type(value).__name__}; expected a path, bytes, or a column of images or sounds")

    def cell(self) -> dict[str, bytes | str | None]:
        """As a cell of a column."""
        return {"bytes": self.data, "path": self.path if self.path is not None else self.name}

    def read_bytes(self) -> bytes:
        """The file's content. Raises DataError, naming it, if it cannot be read."""
        if self.data is not None:
            return self.data
        try:
            return Path(str(self.path)).expanduser().read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {self.name}: {error.strerror}") from None

    def digest(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(self.read_bytes()).hexdigest()
