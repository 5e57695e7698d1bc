"""What a person sees while `fit` runs."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from smidgen.inference.evaluation import Scores
from smidgen.training.run.callbacks import Callback, RunStatus


class Bar(Callback):
    """A bar with loss, validation metric, examples/s and time left; prints nothing if `show` is False.

    `show=None` means a bar if stderr is a terminal, else a line per validation.
    """

    def __init__(self, total: int, done: int = 0, show: bool | None = None, label: str = "") -> None:
        self.lines = show is None and not sys.stderr.isatty()
        self.show = not self.lines if show is None else show
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
        self.start, self.seen, self.last = time.perf_counter(), 0, float("nan")

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

    def on_step(self, run: RunStatus) -> None:
        """One optimiser step done."""
        self.step(run.loss, run.examples)

    def on_validation(self, run: RunStatus, scores: Scores) -> None:
        """A validation done."""
        self.validated(scores.metric, scores.value)

    def step(self, loss: float, examples: int) -> None:
        """One optimiser step done."""
        self.seen += examples
        self.last = loss
        self.progress.update(self.task, advance=1, loss=f"{loss:.4f}", rate=f"{self.rate:.0f} examples/s")

    def validated(self, name: str, value: float) -> None:
        """A validation done."""
        said = f"validation {name} {value:.4f}"
        self.progress.update(self.task, metric=said)
        if self.lines:
            done, total = (
                int(count or 0) for count in (self.progress.tasks[0].completed, self.progress.tasks[0].total)
            )
            print(f"step {done} of {total}: loss {self.last:.4f}, {said}, {self.rate:.0f} examples/s", file=sys.stderr)
