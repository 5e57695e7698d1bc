"""A bar that counts trials made elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Found = TypeVar("Found")


def counted(found: Generator[Found], label: str, total: int, progress: bool | None) -> Iterator[Found]:
    """The same, with a bar on stderr; `progress` None: on a terminal."""
    shown = sys.stderr.isatty() if progress is None else progress
    with closing(found):
        yield from track(found, f"{label}, trials", total=total, console=Console(stderr=True), disable=not shown)
