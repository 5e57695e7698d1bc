"""compare: make a study's runs, as far as they are not there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from smidgen.common.errors import StudyError
from smidgen.common.folder_lock import folder_lock_held
from smidgen.data.resplitting import with_test
from smidgen.studies.comparison.arm_runs import run_cell
from smidgen.studies.comparison.cell import StudyCell
from smidgen.studies.comparison.run_store import Result, RunStore
from smidgen.studies.comparison.study import Study
from smidgen.studies.runners.opening import LOCAL, opened
from smidgen.studies.trackers import StudyTracker


@dataclass(frozen=True)
class StudyRuns:
    """A study and its results, in the order of its grid."""

    study: Study
    results: tuple[Result, ...]
    store: RunStore

    @property
    def failed(self) -> list[Result]:
        """Runs that came to no delta."""
        return [result for result in self.results if result.error is not None]


def reopened(out: str | os.PathLike[str]) -> StudyRuns:
    """What is there of a study, without any run. Raises StudyError if the folder holds none."""
    store = RunStore(out)
    study = Study.of(store.study())
    return StudyRuns(study, tuple(in_order(study, store.results())), store)


def in_order(study: Study, results: Iterable[Result]) -> list[Result]:
    """The results that a study's grid asks for, in its order."""
    sizes = [None if size == "all" else size for size in study.examples]
    arms = {name: str(arm.parsed) for name, arm in study.arms.items()}

    def place(result: Result) -> tuple[int, ...]:
        order = (study.models.index(result.model), sizes.index(result.examples), list(arms).index(result.arm))
        return (*order, study.seeds.index(result.seed))

    kept = [
        result
        for result in results
        if result.model in study.models
        and result.examples in sizes
        and arms.get(result.arm) == result.recipe
        and result.seed in study.seeds
    ]
    return sorted(kept, key=lambda result: (place(result)[:1], result.task, place(result)[1:], result.lr))


def compare(
    study: Study,
    out: str | os.PathLike[str],
    *,
    jobs: int = 1,
    on: str = LOCAL,
    told: Callable[[Result], None] | None = None,
    tested: bool = True,
    tracker: str | None = None,
) -> StudyRuns:
    """Make the runs of a study in a folder. Killed at any point, the same call goes on; done runs are not repeated.

    Args:
        out: a folder, or a URL of fsspec: s3://, gs://, ... (see `StudyPlace`).
        jobs: so many runs at once, in processes that share the base's pages and torch's threads.
        on: where runs are made: "local"; "ray", "auto" or "ray://host:port" for Ray on this machine or a cluster.
        told: is given every result, also those that were there.
        tested: whether the best rates are tested; without it the test split is not read.
        tracker: "tensorboard", "trackio" or "wandb", which gets the runs too.

    Raises:
        StudyError: `out` holds something else, another call works in it, or there is no such tracker.
        DataError: a task cannot be read, or has nothing to validate on; before anything is trained.
    """
    if jobs < 1:
        raise StudyError(f"jobs={jobs} must be at least 1")
    store = RunStore(out)
    tracked = None if tracker is None else StudyTracker.named(tracker, study.name, store)
    tasks = [with_test(data.load(), validation=study.validation) for data in study.tasks]
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise StudyError(f"two tasks are named {twice!r}; give them a name= each")
    results: list[Result] = []

    def tell(result: Result) -> None:
        if told is not None:
            told(result)
        if tracked is not None:
            tracked.told(result)

    with folder_lock_held(store.path), opened(on, jobs, False) as runner:
        store.begin(study.model_dump(mode="json"))
        for model in study.models:
            for task in tasks:
                for examples in study.examples:
                    count = None if examples == "all" else int(examples)
                    cell = StudyCell(study, store, model, task, count, runner, tell, tested)
                    found = run_cell(cell)
                    results += found
                    if tracked is not None:
                        tracked.tested(found)
    return StudyRuns(study, tuple(results), store)
