"""The runs of one arm in a cell: every rate with the tuning seeds, the best with the others, then the test split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean

from torch import Tensor
from transformers import PreTrainedModel

from smidgen.common.errors import SmidgenError
from smidgen.data.metrics import METRICS
from smidgen.delta.delta import Delta
from smidgen.inference.evaluation import evaluate
from smidgen.planning.resolution import resolve
from smidgen.steps.objectives import TaskLoss
from smidgen.studies.comparison.cell import StudyCell
from smidgen.studies.comparison.costs import run_costs
from smidgen.studies.comparison.forgetting import feature_drift
from smidgen.studies.comparison.run_store import FIT, Examples, Result, key_of
from smidgen.studies.comparison.scratch_models import from_scratch
from smidgen.studies.comparison.study import StudyArm
from smidgen.studies.comparison.study_work import StudyWork
from smidgen.studies.rates import rates_around
from smidgen.studies.runners.local import trials
from smidgen.studies.trial import Trial
from smidgen.training.run.settings import Settings


def run_cell(cell: StudyCell) -> list[Result]:
    """All runs; those that are there are not repeated. Rates are chosen on validation, then the test split is read."""
    return [result for name in cell.study.arms for result in _run_arm(cell, name)]


def _run_arm(cell: StudyCell, name: str) -> list[Result]:
    """The runs of one arm; those at the chosen rate with their metrics on the test split."""
    study, arm, failure = cell.study, cell.study.arms[name], None
    model, _ = cell.loaded
    rate = "lr"
    try:
        rate = "lr" if resolve(model, arm.parsed, arm.pooling).entries else "head_lr"
    except SmidgenError as error:  # a recipe that does not fit this model: all its runs fail
        failure = f"{type(error).__name__}: {error}"
    rates = arm.lr or study.lr or tuple(rates_around(arm.parsed, rate, study.trials))
    tuning, rest = study.seeds[: study.tuning_seeds], study.seeds[study.tuning_seeds :]
    each = ArmRuns(cell, name, arm, rate, failure)
    found = each.run([(lr, seed) for lr in rates for seed in tuning])
    best = chosen_rate(found)
    if best is not None:
        found += each.run([(best, seed) for seed in rest])
    done = [each.tested(result) if cell.tested and result.lr == best else result for result in found]
    for result in done:
        cell.store.drop_large(result.key)
    return done


@dataclass(frozen=True, eq=False)
class ArmRuns:
    """The runs of one arm in a cell. `failure`: why none of them can be made."""

    cell: StudyCell
    name: str
    arm: StudyArm
    rate: str
    failure: str | None

    def run(self, wanted: Sequence[tuple[float, int]]) -> list[Result]:
        """The results of (rate, seed), in order."""
        places = [self._place(lr, seed) for lr, seed in wanted]
        known = [self.cell.store.result(place.key) for place in places]
        missing = [place for place, old in zip(places, known, strict=True) if old is None or not old.over]
        fresh = {result.key: result for result in self._made(missing)}
        found = []
        for place, old in zip(places, known, strict=True):
            result = fresh.get(place.key) or old
            assert result is not None
            if place.key not in fresh:
                self.cell.told(result)
            found.append(result)
        return found

    def tested(self, result: Result) -> Result:
        """A result with its metrics on the test split, read once."""
        cell = self.cell
        if result.error is not None or result.test is not None:
            return result
        if not (cell.store.folder(result.key) / FIT).is_dir():  # dropped, when another rate was the best
            (result,) = self._made([self._place(result.lr, result.seed)])
        delta = Delta.load(cell.store.folder(result.key) / FIT)
        model, processor = self._based(result.seed), cell.loaded[1]
        scores = evaluate(model, cell.source, delta=delta, split="test", processor=processor)
        costs = {**result.costs, "feature_drift": None if self.arm.scratch else feature_drift(model, delta, processor)}
        found = replace(result, test=scores.values, costs=costs)
        cell.store.keep(found, Examples(scores.predictions, scores.references))
        return found

    def _settings(self, lr: float, seed: int) -> Settings:
        own = {self.rate: lr, "seed": seed, "pooling": self.arm.pooling}
        return Settings.of({**self.cell.study.settings, **own})

    def _place(self, lr: float, seed: int) -> Result:
        """A result that has not come yet, with its key."""
        cell, recipe = self.cell, self.arm.parsed
        key = key_of(
            base=cell.content,
            recipe=self.arm.drawn(seed).to_json(),
            scratch=self.arm.scratch,
            data=cell.tasks[seed].fingerprint,
            settings=asdict(self._settings(lr, seed)),
        )
        task = cell.source
        return Result(
            key, cell.model, task.name, task.metric, cell.examples, self.name, str(recipe), seed, self.rate, lr
        )

    def _made(self, missing: Sequence[Result]) -> Iterator[Result]:
        """Make runs, group by group, and keep what comes of each."""
        if self.failure is not None:
            for place in missing:
                yield self._kept(replace(place, error=self.failure))
            return
        for group in self._groups(missing):
            seed = group[0].seed if self.arm.scratch else None
            todo = [(self._settings(place.lr, place.seed), self.cell.store.folder(place.key) / FIT) for place in group]
            runs = trials(self._work(seed, len(group)), todo, self.cell.jobs, False)
            for place, (trial, delta) in zip(group, runs, strict=True):
                yield self._kept(self._ended(place, trial, delta))

    def _groups(self, missing: Sequence[Result]) -> list[list[Result]]:
        """Runs that start from the same weights: all of them, or those of a seed where weights are drawn by it."""
        if not self.arm.scratch:
            return [list(missing)] if missing else []
        seeds = dict.fromkeys(place.seed for place in missing)
        return [[place for place in missing if place.seed == seed] for seed in seeds]

    def _based(self, seed: int | None) -> PreTrainedModel:
        model, _ = self.cell.loaded
        return model if seed is None or not self.arm.scratch else from_scratch(model, seed)

    def _work(self, seed: int | None, runs: int) -> StudyWork:
        cell = self.cell
        epochs = Settings.of(cell.study.settings).epochs * runs
        heads: Mapping[int, Mapping[str, Tensor]] = {} if seed is None else {seed: {}}
        return StudyWork(
            self._based(seed), self.arm.parsed, cell.source, TaskLoss(), cell.loaded[1], self.rate, epochs,
            None, cell.tasks, {seed: self.arm.drawn(seed) for seed in cell.study.seeds}, heads or cell.heads,
        )  # fmt: skip

    def _ended(self, place: Result, trial: Trial, delta: Delta | None) -> Result:
        found = replace(
            place, validation=trial.value(place.metric), scores=trial.scores, best_epoch=trial.best_epoch,
            error=trial.error, diverged=trial.error is not None and not trial.failed,
        )  # fmt: skip
        return found if delta is None else replace(found, costs=run_costs(self.cell, self.arm, place.key, trial, delta))

    def _kept(self, result: Result) -> Result:
        self.cell.store.keep(result)
        self.cell.told(result)
        return result


def chosen_rate(results: Sequence[Result]) -> float | None:
    """The rate whose mean validation over seeds is best, the earlier of equals; None if each failed at some seed."""
    means: dict[float, float] = {}
    for lr in dict.fromkeys(result.lr for result in results):
        values = [result.validation for result in results if result.lr == lr]
        if all(value is not None for value in values):
            sign = 1 if METRICS[results[0].metric].higher_is_better else -1
            means[lr] = sign * fmean(value for value in values if value is not None)
    return max(means, key=lambda lr: means[lr]) if means else None
