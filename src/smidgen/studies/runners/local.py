"""Trials on this machine: one after another, or several at once, each in a process of its own.

A step of a small model keeps several cores busy for half of its time at best: what lies between its matrix products is
too small to share. One trial per core keeps all of them busy. Processes are loky's: scripts need no main guard for
them, and what is defined in a script or a notebook can be sent.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from smidgen.common.errors import TrainError
from smidgen.delta.delta import Delta
from smidgen.efficiency.prefix_cache.shared_caches import Kept
from smidgen.studies.runners.counting import counted
from smidgen.studies.runners.packing import sending
from smidgen.studies.runners.runner import Batches, Runner
from smidgen.studies.runners.work import Todo, Work
from smidgen.studies.trial import Trial
from smidgen.training.run.settings import Settings


@contextmanager
def on_this_machine(on: str, jobs: int, progress: bool | None) -> Iterator[Runner]:
    """So many trials at once on this machine. Raises TrainError if that is none."""
    if jobs < 1:
        raise TrainError(f"jobs={jobs} must be at least 1")
    yield LocalRunner(jobs, progress)


@dataclass(frozen=True)
class LocalRunner:
    """See `Runner`. Trials that have their work in common share what is frozen; batches come one after another."""

    jobs: int
    progress: bool | None

    def trials(self, batches: Batches) -> Iterator[tuple[Trial, Delta | None]]:
        """See `Runner`."""
        for work, todo in batches:
            jobs = min(self.jobs, len(todo))
            if jobs > 1:
                yield from counted(_at_once(work, todo, jobs), str(work.recipe), len(todo), self.progress)
                continue
            kept = work.kept()
            for settings, out in todo:
                yield work.run(settings, out, self.progress, kept)


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
        with sending(f"jobs={jobs}", "use jobs=1"):
            torch.save(work, path, pickle_module=cloudpickle)
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
