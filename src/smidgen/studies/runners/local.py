"""The trials of a search: one after another, or several at once, each in a process of its own.

A step of a small model keeps several cores busy for half of its time at best: what lies between its matrix products is
too small to share. One trial per core keeps all of them busy. Processes are loky's: scripts need no main guard for
them, and what is defined in a script or a notebook can be sent.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from smidgen.common.errors import DivergedError, TrainError
from smidgen.data.processor import Processor
from smidgen.data.task import Task
from smidgen.delta.delta import Delta
from smidgen.efficiency.prefix_cache.shared_caches import Kept
from smidgen.recipe.recipe import Recipe
from smidgen.steps.objectives import Objective
from smidgen.studies.trial import Trial
from smidgen.training.run.loop import Loop
from smidgen.training.run.run_spec import RunSpec
from smidgen.training.run.settings import Settings

Todo = Sequence[tuple[Settings, Path | None]]


@dataclass(frozen=True, eq=False)
class Work:
    """What the trials of a search have in common.

    Attributes:
        rate: the setting that is tried, "lr" or "head_lr".
        epochs: of all trials together.
        folder: for hidden states that are too large for memory.
    """

    model: nn.Module
    recipe: Recipe
    task: Task
    objective: Objective
    processor: Processor | None
    rate: str
    epochs: int
    folder: Path | None

    def kept(self) -> Kept:
        """For hidden states that the trials of one process share."""
        return Kept(self.epochs, self.folder)

    def run(
        self, settings: Settings, out: Path | None, progress: bool | None, kept: Kept
    ) -> tuple[Trial, Delta | None]:
        """One trial; a loss that is not finite any more ends it, not the search."""
        start, delta, error = time.perf_counter(), None, None
        spec = RunSpec(
            self.model,
            self.recipe,
            self.task,
            settings,
            self.objective,
            out=out,
            processor=self.processor,
            progress=progress,
            shared=kept,
        )
        loop = Loop(spec)
        try:
            delta = loop.fit()
        except DivergedError as diverged:
            error = str(diverged)
        scores = tuple(dict(entry.scores) for entry in loop.history())
        best = None if delta is None else delta.info["best_epoch"]
        lr, seconds = getattr(settings, self.rate), time.perf_counter() - start
        return Trial(lr, settings.seed, scores, best, seconds, error), delta


def trials(work: Work, todo: Todo, jobs: int, progress: bool | None) -> Iterator[tuple[Trial, Delta | None]]:
    """Trials in order, each with its delta or None if it diverged.

    Raises:
        TrainError: what `fit` raises; or a process cannot be given its work, or was killed.
    """
    if jobs > 1 and len(todo) > 1:
        shown = sys.stderr.isatty() if progress is None else progress
        with closing(_at_once(work, todo, min(jobs, len(todo)))) as found:
            label, console = f"{work.recipe}, trials", Console(stderr=True)
            yield from track(found, label, total=len(todo), console=console, disable=not shown)
        return
    kept = work.kept()
    for settings, out in todo:
        yield work.run(settings, out, progress, kept)


def _at_once(work: Work, todo: Todo, jobs: int) -> Generator[tuple[Trial, Delta | None]]:
    """Trials from several processes that map one copy of the base, in the order given."""
    from loky import ProcessPoolExecutor

    threads = max(1, torch.get_num_threads() // jobs)
    with _written(work, jobs) as path:
        pool = ProcessPoolExecutor(jobs, initializer=_begin, initargs=(str(path), threads, os.getpid()))
        try:
            for future in [pool.submit(_one, *each) for each in todo]:
                yield future.result()
        except BrokenProcessPool as error:
            raise TrainError(
                f"one of {jobs} processes of the search was killed, as happens when memory runs out; fewer jobs need "
                "less, and with `out` the search goes on where it stopped"
            ) from error
        finally:
            pool.shutdown(kill_workers=True)


@contextmanager
def _written(work: Work, jobs: int) -> Iterator[Path]:
    """The work in a file that all processes map, so that they share the pages of the base."""
    import cloudpickle

    with tempfile.TemporaryDirectory(prefix="smidgen-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "work.pt"
        try:
            torch.save(work, path, pickle_module=cloudpickle)
        except Exception as error:  # whatever a model, a processor or an objective raises when it is pickled
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise TrainError(
                f"jobs={jobs} sends model, task and objective to other processes: {said}; use jobs=1"
            ) from error
        yield path


@dataclass
class _Process:
    """A process that runs trials: its work, and what it has kept."""

    work: Work
    kept: Kept


_process: list[_Process] = []  # one, once it is ready


def _begin(path: str, threads: int, parent: int) -> None:
    """Make a new process ready for trials."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    # Whole objects, so no weights_only: the file was written by the search itself, into a folder of its user alone.
    work = torch.load(path, weights_only=False, mmap=True)
    _process[:] = [_Process(work, work.kept())]


def _one(settings: Settings, out: Path | None) -> tuple[Trial, Delta | None]:
    (here,) = _process
    return here.work.run(settings, out, False, here.kept)


def _end_with(parent: int) -> None:
    """A search that is killed must not leave processes that write into the folder where it goes on."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
