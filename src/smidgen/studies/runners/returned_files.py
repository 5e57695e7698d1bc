"""A run's files, as they come back from another machine: beside its folder, and in it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from smidgen.common.atomic_files import write_files
from smidgen.delta.delta import META


def read_run(out: Path) -> dict[str, bytes]:
    """All files of a run's folder, and those beside it, by their path from the folder's parent."""
    files = (path for path in sorted(out.parent.rglob("*")) if path.is_file())
    return {path.relative_to(out.parent).as_posix(): path.read_bytes() for path in files}


def write_run(out: Path, files: Mapping[str, bytes]) -> None:
    """The inverse. What a run that was killed left there goes; delta.json, which says that all is there, comes last."""
    own = {name.partition("/")[2]: content for name, content in files.items() if "/" in name}
    beside = {name: content for name, content in files.items() if "/" not in name}
    if beside:
        write_files(out.parent, beside)
    if out.exists():
        shutil.rmtree(out)
    write_files(out, dict(sorted(own.items(), key=lambda item: item[0] == META)))
