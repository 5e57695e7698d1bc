"""What a person sees while `fit` runs."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """A bar with loss, validation metric, examples/s and time left; prints nothing if `show` is False.

    `show=None` means: if stderr is a terminal.
    """

    def __init__(self, total: int, done: int = 0, show: bool | None = None, label: str = "") -> None:
        self.show = sys.stderr.isatty() if show is None else show
        self.console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[metric]}  {task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=self.console, disable=not self.show)
        self.task = self.progress.add_task(label, total=total, completed=done, loss="-", metric="", rate="")
        self.start, self.seen = time.perf_counter(), 0

    def __enter__(self) -> Self:
        self.progress.start()
        self.start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    @property
    def rate(self) -> float:
        """Training examples per second since the start of this process's run, validation included."""
        return self.seen / max(time.perf_counter() - self.start, 1e-9)

    def step(self, loss: float, examples: int) -> None:
        """One optimiser step done."""
        self.seen += examples
        self.progress.update(self.task, advance=1, loss=f"{loss:.4f}", rate=f"{self.rate:.0f} examples/s")

    def validated(self, name: str, value: float) -> None:
        """A validation done."""
        self.progress.update(self.task, metric=f"validation {name} {value:.4f}")
