"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smidgen.common.errors import DeltaError, WriteError


def write_files(folder: Path, data: Mapping[str, bytes]) -> Path:
    """Write several files into a folder, each by a rename; all are on disk before the first one appears.

    Raises:
        WriteError: the folder cannot be written or the disk is full; nothing that was there is lost.
    """
    temporary: list[tuple[str, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in data.items():
            temporary.append((_write_temporary(folder, content), folder / name))
        for path, target in temporary:
            os.replace(path, target)
    except OSError as error:
        raise WriteError(f"cannot write to {folder}: {error.strerror or error}") from None
    finally:
        for path, _ in temporary:
            Path(path).unlink(missing_ok=True)
    return folder


def _write_temporary(folder: Path, content: bytes) -> str:
    """A file of this content beside its goal, on the disk when this returns; its path."""
    handle, path = tempfile.mkstemp(dir=folder, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(path, 0o644)
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises DeltaError if the file is missing, no JSON or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DeltaError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise DeltaError(f"{path} is damaged: not JSON") from None
    if not isinstance(value, dict):
        raise DeltaError(f"{path} is damaged: not a JSON object")
    return value
