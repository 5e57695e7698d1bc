"""search: several trials of one recipe, at several learning rates, that share what is frozen."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Unpack

from accelerate import PartialState
from torch import nn

from smidgen.common.errors import TrainError
from smidgen.common.folder_lock import folder_lock_held
from smidgen.common.wrappers import bare, check_model
from smidgen.data.processor import Processor, given_processor
from smidgen.data.task import Task
from smidgen.planning.resolution import resolve
from smidgen.recipe.recipe import Recipe, Term, as_recipe
from smidgen.steps.objectives import Objective, TaskLoss
from smidgen.studies.rates import SPAN, rates_around
from smidgen.studies.runners.opening import LOCAL, opened
from smidgen.studies.runners.work import Work
from smidgen.studies.search_folder import Ledger
from smidgen.studies.trial import Search, Trial
from smidgen.training.run.run_record import asked
from smidgen.training.run.run_spec import RunSpec
from smidgen.training.run.settings import Settings, SharedOptions


class SearchWarning(UserWarning):
    """The best rate is the lowest or the highest that was tried."""


def search(  # noqa: PLR0913 - options by keyword
    model: nn.Module, recipe: str | Term | Recipe, task: Task, *, lr: Sequence[float] | None = None,
    seeds: Sequence[int] = (0,), trials: int = 10, jobs: int = 1, out: str | os.PathLike[str] | None = None,
    processor: Processor | None = None, tokenizer: Processor | None = None, objective: Objective | None = None,
    progress: bool | None = None, say: Callable[[str], None] | None = None, on: str = LOCAL,
    **settings: Unpack[SharedOptions],
) -> Search:  # fmt: skip
    """Train one recipe at several rates, and with several seeds; the best by validation comes back with its delta.

    Each trial is a run of `fit`, bit for bit where both come to the same choice of `cache` and run on as many threads.
    Hidden states below the lowest edit are computed once for all trials of a process. With `out`, a search that was
    killed goes on by the same call, and a call with further rates or seeds makes only those.

    Args:
        lr: rates to try; None for `trials` rates, log-spaced from a tenth of the recipe's own to ten times it. Where
            only the head is trained, the rates are the head's.
        seeds: each rate is tried with each of them; all heads start as the model's does.
        jobs: so many trials run at once, in processes that share torch's threads; the progress bar counts trials.
        out: gets the best delta, search.json, and the run of each trial in `runs`.
        processor: as in `fit`; `tokenizer` is another name of it.
        say: gets a line per finished trial.
        on: where trials run: "local"; "ray", "auto" or "ray://host:port" for Ray on this machine or a cluster.
        settings: fields of `Settings`, but seed and lr.

    Raises:
        TrainError: nothing to try, a setting that cannot be, `out` holds something else, or every trial diverged.
        DataError: no train or no validation split.
    """
    check_model(model)
    wanted = Trials.of(bare(model), as_recipe(recipe), task, (lr, seeds, trials), objective or TaskLoss(), settings)
    with folder_lock_held(out), opened(on, jobs, progress) as runner:
        ledger = Ledger(out, wanted.asked(), wanted.rate)
        missing = [each for each in wanted.settings if ledger.trial(each) is None]
        work = wanted.work(given_processor(processor, tokenizer), ledger.path)
        made = runner.trials([(work, [(each, ledger.folder(each)) for each in missing])])
        for each, (trial, delta) in zip(missing, made, strict=True):
            ledger.add(each, trial, delta)
            done = wanted.done(ledger)
            ledger.written(done)
            if say is not None:
                say(wanted.told(trial, len(done)))
        found = wanted.found(wanted.done(ledger))
        return _warned(ledger.finish(found, wanted.settings[found.trials.index(found.best)]))


@dataclass(frozen=True)
class Trials:
    """What is to be tried: settings that differ in the rate and the seed alone."""

    model: nn.Module
    recipe: Recipe
    task: Task
    objective: Objective
    rate: str
    settings: tuple[Settings, ...]

    @classmethod
    def of(
        cls, model: nn.Module, recipe: Recipe, task: Task, tried: tuple[Sequence[float] | None, Sequence[int], int],
        objective: Objective, given: Mapping[str, object],
    ) -> Trials:  # fmt: skip
        """Everything is checked here, before anything is trained. `tried`: rates, seeds, number of default rates."""
        if PartialState().num_processes > 1:
            raise TrainError("a search runs in one process; start it without a launcher")
        if "seed" in given:
            raise TrainError(f"a search takes seeds=({given['seed']!r},), not seed={given['seed']!r}")
        rate = "lr" if resolve(model, recipe).entries else "head_lr"
        if rate in given and given[rate] is not None:
            raise TrainError(f"{recipe} trains the head alone, so lr= names the head's rates; leave out {rate}=")
        rates, seeds = rates_around(recipe, rate, tried[2]) if tried[0] is None else tried[0], tried[1]
        for name, values in (("lr", rates), ("seeds", seeds)):
            if not values or len(set(values)) < len(values):
                raise TrainError(f"{name}={list(values)} must name at least one value, and none of them twice")
        for split in ("train", "validation"):
            task.split(split)
        each = (Settings.of({**given, rate: lr, "seed": seed}) for lr in rates for seed in seeds)
        return cls(model, recipe, task, objective, rate, tuple(each))

    def work(self, processor: Processor | None, folder: Path | None) -> Work:
        """What all trials have in common."""
        epochs = sum(each.epochs for each in self.settings)
        return Work(self.model, self.recipe, self.task, self.objective, processor, self.rate, epochs, folder)

    def asked(self) -> dict[str, object]:
        """What all trials have in common, plain data."""
        spec = RunSpec(self.model, self.recipe, self.task, self.settings[0], self.objective)
        tried = ("seed", self.rate)
        settings = {name: value for name, value in asdict(self.settings[0]).items() if name not in tried}
        return {**asked(spec), "settings": settings}

    def done(self, ledger: Ledger) -> list[Trial]:
        """The trials that came to an end, in order."""
        found = (ledger.trial(each) for each in self.settings)
        return [trial for trial in found if trial is not None]

    def found(self, trials: Sequence[Trial]) -> Search:
        """The result. Raises TrainError if every trial diverged."""
        if all(trial.error for trial in trials):
            rates = sorted({trial.lr for trial in trials})
            raise TrainError(f"every trial diverged, the lowest {self.rate} being {rates[0]:g}; try lower ones")
        return Search(self.recipe, self.task.name, self.task.metric, self.rate, tuple(trials))

    def told(self, last: Trial, done: int) -> str:
        """A line about the last trial."""
        value = last.value(self.task.metric)
        came = last.error or f"{self.task.metric} {value:.4f} at epoch {last.best_epoch}"
        return f"{self.rate} {last.lr:g}, seed {last.seed}: {came} ({done} of {len(self.settings)})"


def _warned(found: Search) -> Search:
    if found.edge is not None:
        towards, factor = ("up", SPAN) if found.edge == "highest" else ("down", 1 / SPAN)
        warnings.warn(
            f"the best {found.rate}, {found.best.lr:g}, is the {found.edge} that was tried; "
            f"try some {towards} to {found.best.lr * factor:.3g} too",
            SearchWarning,
            stacklevel=3,
        )
    return found
