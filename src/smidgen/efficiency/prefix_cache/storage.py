"""Hidden states in memory, or in a file that is mapped and appears whole or not at all."""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from smidgen.common.errors import TrainError

_CHUNK = 1 << 24


def in_memory(parts: Iterable[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Parts (n, d) end to end, one after another: (tokens, d)."""
    states, done = torch.empty(shape, dtype=dtype), 0
    for part in parts:
        states[done : done + len(part)] = part
        done += len(part)
    return states


def in_file(parts: Iterable[Tensor], path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The same, written to a file and mapped.

    Raises:
        TrainError: the folder cannot be written, or the disk is full; nothing is left behind.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            check = _seed(path)
            for part in parts:
                data = part.contiguous().view(torch.uint8).numpy().data
                check = zlib.crc32(data, check)
                file.write(data)
            file.write(check.to_bytes(4, "big"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise TrainError(f"cannot keep hidden states in {path.parent}: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return _mapped(path, shape, dtype)


def from_file(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    """What `in_file` wrote; None if there is no such file, or it is damaged or of another size."""
    size = shape[0] * shape[1] * dtype.itemsize
    try:
        if path.stat().st_size != size + 4 or not _sound(path, size):
            return None
        return _mapped(path, shape, dtype)
    except (OSError, RuntimeError):
        return None


def _seed(path: Path) -> int:
    """The file's name goes into its checksum, so that a renamed file is not taken for another."""
    return zlib.crc32(path.name.encode())


def _sound(path: Path, size: int) -> bool:
    check = _seed(path)
    with path.open("rb") as file:
        while size:
            data = file.read(min(_CHUNK, size))
            if not data:
                return False
            check, size = zlib.crc32(data, check), size - len(data)
        return file.read() == check.to_bytes(4, "big")


def _mapped(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=False, size=shape[0] * shape[1], dtype=dtype).view(shape)
