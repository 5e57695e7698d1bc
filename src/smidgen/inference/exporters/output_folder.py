"""A folder that appears whole or not at all, with room on the disk looked for before."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smidgen.common.byte_sizes import format_bytes
from smidgen.common.errors import DeltaError, WriteError

RECORD = "export.json"  # says what an export is, and that the folder is one
SPARE = 32 * 2**20  # tokenizer, configuration, and what a file system needs for itself


@contextmanager
def new_folder(out: Path, needed: int) -> Iterator[Path]:
    """A folder beside `out` to write into, which takes its place at the end; after an error nothing is left of it.

    Args:
        needed: bytes that will be written.

    Raises:
        DeltaError: `out` is a file, or holds what is not an earlier export.
        WriteError: there is not enough room, or it cannot be written.
    """
    _refuse_foreign(out)
    parents = [each for each in out.absolute().parents if not each.exists()]
    staging: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _check_room(out, needed)
        staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
        yield staging
        staging.chmod(0o755)
        _put(staging, out)
    except OSError as error:
        raise WriteError(f"cannot write to {out}: {error.strerror or error}") from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for each in parents:
            if each.exists() and not any(each.iterdir()):
                each.rmdir()


def _refuse_foreign(out: Path) -> None:
    if out.is_file():
        raise DeltaError(f"{out} is a file, not a folder; choose another --out")
    there = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    strange = [name for name in there if name not in _written(out)]
    if strange:
        raise DeltaError(f"{out} exists and holds what is no export of smidgen ({strange[0]}); choose another --out")


def _written(out: Path) -> set[str]:
    """The names that an earlier export wrote into a folder."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        return {RECORD, *record["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _check_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < needed + SPARE:
        raise WriteError(
            f"not enough disk for the export: it takes {format_bytes(needed + SPARE)}, and {out.parent} has "
            f"{format_bytes(free)} free"
        )


def _put(staging: Path, out: Path) -> None:
    """Let a folder take the place of what is there, which is put back if that fails."""
    if not out.exists():
        os.rename(staging, out)
        return
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-old-"))
    os.rename(out, old)
    try:
        os.rename(staging, out)
    except OSError:
        os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
