"""One writer for a folder at a time, by a lock that the operating system drops with the process that holds it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from smidgen.common.errors import DeltaError, TrainError

NAME = ".lock"
PATIENCE = 2.0  # seconds that a process which was told to stop may take to do so


@contextmanager
def folder_lock_held(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Keep other processes, and other calls in this one, from writing into a folder; None is no folder.

    The folder is made if it is not there, and removed again if it is empty at the end. The lock's file goes with the
    lock; what a killed process leaves of it holds nobody up.

    Raises:
        TrainError: the folder is in use, or a file.
        DeltaError: it cannot be written.
    """
    if folder is None:
        yield
        return
    path = Path(folder)
    new = [each for each in (path, *path.parents) if not each.exists()]
    lock = FileLock(path / NAME)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE, poll_interval=0.1)
    except FileExistsError:
        raise TrainError(f"{path} is a file, not a folder") from None
    except Timeout:
        raise TrainError(
            f"{path} is in use: another run writes into it; wait for its end, or choose another --out"
        ) from None
    except OSError as error:
        raise DeltaError(f"cannot write to {path}: {error.strerror or error}") from None
    try:
        yield
    finally:
        # While it is held: filelock sees that the file it has got is gone, and makes another.
        (path / NAME).unlink(missing_ok=True)
        lock.release()
        for each in new:
            if any(each.iterdir()):
                break
            each.rmdir()
