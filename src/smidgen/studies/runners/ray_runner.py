"""Trials on Ray: one task each, on one machine or many; extra `ray`.

A machine needs no disk in common with this one: it gets base, task and objective by Ray's object store, and gives back
the run's files, which this process writes. So a process that outlives the call cannot write into a folder where
another goes on.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from torch import nn

from smidgen.common.errors import TrainError
from smidgen.delta.delta import Delta
from smidgen.studies.runners.counting import counted
from smidgen.studies.runners.packing import packed, sending
from smidgen.studies.runners.ray_process import Made, run_one
from smidgen.studies.runners.returned_files import write_run
from smidgen.studies.runners.runner import Batches, Runner
from smidgen.studies.runners.work import Work
from smidgen.studies.trial import Trial
from smidgen.training.run.run_folder import RunFolder
from smidgen.training.run.settings import Settings

RETRIES = 2  # of a trial whose process or machine dies
PORT = 10001  # Ray's own for ray:// addresses
PATIENCE = 10.0  # seconds for a machine to answer at all


@contextmanager
def on_ray(on: str, jobs: int, progress: bool | None) -> Iterator[Runner]:
    """Trials on Ray: "ray" begins one on this machine alone, which ends with the `with`; else a cluster that runs.

    A process that is connected to Ray already goes on with that.

    Raises:
        TrainError: Ray is not installed, or cannot be reached; or `jobs` are given.
    """
    if jobs != 1:
        raise TrainError(f"jobs={jobs} is for on='local'; on={on!r} makes as many at once as Ray has CPUs or GPUs")
    try:
        import ray
    except ImportError:
        raise TrainError(f"on={on!r} needs a further package: pip install 'smidgen[ray]'") from None
    mine = not ray.is_initialized()
    if mine:
        _connect(ray, on)
    try:
        yield RayRunner(progress)
    finally:
        if mine:
            ray.shutdown()


def _connect(ray: Any, on: str) -> None:
    """Connect this process. Raises TrainError, saying why, if nothing answers."""
    address = os.environ.get("RAY_ADDRESS") if on == "auto" else on
    if address not in (None, "ray", "auto", "local"):
        _check_reachable(address)
    try:
        ray.init(address="local" if on == "ray" else on, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise TrainError(
            f"on={on!r}: no Ray can be reached: {said}; one that asks for a token wants RAY_AUTH_MODE=token here"
        ) from None


def _check_reachable(on: str) -> None:
    """Ray itself would try for minutes, and leave its client in a state where it cannot try again."""
    try:
        address = urlsplit(on if "://" in on else f"//{on}")
        host, port = address.hostname, address.port or PORT
    except ValueError as error:
        raise TrainError(f"on={on!r} is no address: {error}; ray://host:port is one") from None
    if not host:
        raise TrainError(f"on={on!r} names no host; ray://host:port does")
    try:
        socket.create_connection((host, port), timeout=PATIENCE).close()
    except OSError as error:
        raise TrainError(
            f"on={on!r}: nothing answers at {host}:{port} ({error.strerror or error}); `ray start --head` begins a "
            f"cluster, which listens at port {PORT}"
        ) from None


@dataclass(frozen=True, eq=False)
class _Sent:
    """A trial that Ray is to make.

    Attributes:
        work: without the model, which is in the store once for all trials on it.
        base, rest: where the store has the model and the work.
    """

    work: Work
    base: Any
    rest: Any
    settings: Settings
    out: Path | None


Ended = tuple[Trial, Delta | None]


@dataclass(frozen=True, eq=False)
class RayRunner:
    """See `Runner`. Trials of all batches are handed to Ray at once, and written as they end."""

    progress: bool | None

    def trials(self, batches: Batches) -> Iterator[Ended]:
        """See `Runner`."""
        wanted = list(self._sent(batches))
        if wanted:
            recipes = ", ".join(dict.fromkeys(str(one.work.recipe) for one in wanted if isinstance(one, _Sent)))
            yield from counted(self._made(wanted), recipes, len(wanted), self.progress)

    def _sent(self, batches: Batches) -> Iterator[_Sent | Ended]:
        """Everything in the store; a run that is finished is read here."""
        import ray

        bases: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
        for work, todo in batches:
            light, rest = replace(work, model=nn.Module()), None
            for settings, out in todo:
                if RunFolder(out).finished:
                    yield work.run(settings, out, False, work.kept())
                    continue
                with sending("Ray", "use on='local' and jobs=1"):
                    if work.model not in bases:
                        bases[work.model] = ray.put(packed(work.model))
                    rest = rest or ray.put(packed(light))
                yield _Sent(light, bases[work.model], rest, settings, out)

    def _made(self, wanted: list[_Sent | Ended]) -> Generator[Ended]:
        """In the order asked for; whatever ends is written at once, so that nothing that was made is lost."""
        import ray

        sent = [one for one in wanted if isinstance(one, _Sent)]
        submit = _task(len(sent))
        waiting = {submit(one): one for one in sent}
        ended: dict[_Sent, Trial | Ended] = {}
        try:
            for one in wanted:
                if not isinstance(one, _Sent):
                    yield one
                    continue
                while one not in ended:
                    (reference,), _ = ray.wait(list(waiting), num_returns=1)
                    other = waiting.pop(reference)
                    ended[other] = _came(other, reference)
                found = ended.pop(one)
                yield (found, Delta.load(str(one.out))) if isinstance(found, Trial) else found
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)


def _task(trials: int) -> Any:
    """Hands a trial to Ray. Each takes a CPU, and a GPU where there are some; idle CPUs are shared out as threads."""
    import ray

    there = ray.cluster_resources()
    threads = max(1, int(there.get("CPU", 0)) // max(1, trials))
    task = ray.remote(run_one).options(
        name="smidgen trial",
        num_cpus=1,
        num_gpus=1 if there.get("GPU", 0) >= 1 else 0,
        max_retries=RETRIES,
        scheduling_strategy="SPREAD",
    )
    # In a tuple: Ray would fetch what is a parameter itself, for each trial again.
    return lambda one: task.remote((one.base, one.rest), one.settings, one.out and one.out.name, threads)


def _came(one: _Sent, reference: Any) -> Trial | Ended:
    """What came of a trial; its files are written, and its delta is read from them when it is asked for."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        made: Made = ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        said = next(iter(str(error).splitlines()), "")
        why = f"its process was lost {RETRIES + 1} times ({type(error).__name__}: {said})"
        return one.work.lost(one.settings, why), None
    if one.out is None or not made.files:
        return made.trial, made.delta
    write_run(one.out, made.files)
    return made.trial
