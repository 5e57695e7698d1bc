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
from smidgen.studies.comparison.run_store import Examples, Result
from smidgen.studies.comparison.scratch_models import from_scratch
from smidgen.studies.comparison.study import StudyArm
from smidgen.studies.comparison.study_work import StudyWork
from smidgen.studies.rates import rates_around
from smidgen.studies.run_folders import key_of
from smidgen.studies.runners.work import Todo
from smidgen.studies.trial import Trial
from smidgen.training.run.settings import Settings

Asked = Sequence[tuple["ArmRuns", Sequence[tuple[float, int]]]]


def run_cell(cell: StudyCell) -> list[Result]:
    """All runs; those that are there are not repeated. Rates are chosen on validation, then the test split is read.

    The tuning runs of all arms go to the runner together, and so do those with the other seeds.
    """
    arms = [runs_of_arm(cell, name) for name in cell.study.arms]
    tuning, others = cell.study.seeds[: cell.study.tuning_seeds], cell.study.seeds[cell.study.tuning_seeds :]
    tuned = _run(cell, [(arm, [(lr, seed) for lr in arm.rates for seed in tuning]) for arm in arms])
    best = [chosen_rate(results) for results in tuned]
    for lr, results in zip(best, tuned, strict=True):
        _drop_large(cell, [result for result in results if result.lr != lr])
    chosen = zip(arms, best, strict=True)
    rest = _run(cell, [(arm, [] if lr is None else [(lr, seed) for seed in others]) for arm, lr in chosen])
    found = []
    for arm, lr, first, last in zip(arms, best, tuned, rest, strict=True):
        results = [arm.tested(result) if cell.tested and result.lr == lr else result for result in (*first, *last)]
        _drop_large(cell, results)
        found += results
    return found


def _run(cell: StudyCell, asked: Asked) -> list[list[Result]]:
    """For each arm the results of its (rate, seed), in order."""
    places = [[arm.place(lr, seed) for lr, seed in pairs] for arm, pairs in asked]
    there = (cell.store.result(place.key) for row in places for place in row)
    found = {result.key: result for result in there if result is not None and result.over}
    for result in found.values():
        cell.told(result)
    arms = [arm for arm, _ in asked]
    missing = [[place for place in row if place.key not in found] for row in places]
    found |= {result.key: result for result in make(cell, list(zip(arms, missing, strict=True)))}
    return [[found[place.key] for place in row] for row in places]


def _drop_large(cell: StudyCell, results: Sequence[Result]) -> None:
    for result in results:
        cell.store.drop_large(result.key)


def make(cell: StudyCell, missing: Sequence[tuple[ArmRuns, Sequence[Result]]]) -> Iterator[Result]:
    """Make runs and keep what comes of each. An arm's runs that start from the same weights are one batch."""
    groups = []
    for each, places in missing:
        if each.failure is None:
            groups += [(each, group) for group in each.groups(places)]
            continue
        for place in places:
            yield each.kept(replace(place, error=each.failure))
    runs = cell.runner.trials((each.work(group), each.todo(group)) for each, group in groups)
    for (each, place), (trial, delta) in zip(((e, p) for e, group in groups for p in group), runs, strict=True):
        yield each.kept(each.ended(place, trial, delta))


def runs_of_arm(cell: StudyCell, name: str) -> ArmRuns:
    """The runs of one arm, with the rates that it tries."""
    study, arm, failure = cell.study, cell.study.arms[name], None
    model, _ = cell.loaded
    rate = "lr"
    try:
        rate = "lr" if resolve(model, arm.parsed, arm.pooling).entries else "head_lr"
    except SmidgenError as error:  # a recipe that does not fit this model: all its runs fail
        failure = f"{type(error).__name__}: {error}"
    rates = arm.lr or study.lr or tuple(rates_around(arm.parsed, rate, study.trials))
    return ArmRuns(cell, name, arm, rate, tuple(rates), failure)


@dataclass(frozen=True, eq=False)
class ArmRuns:
    """The runs of one arm in a cell.

    Attributes:
        rate: the setting that is tried, "lr" or "head_lr"; `rates`: its values.
        failure: why none of the runs can be made.
    """

    cell: StudyCell
    name: str
    arm: StudyArm
    rate: str
    rates: tuple[float, ...]
    failure: str | None

    def tested(self, result: Result) -> Result:
        """A result with its metrics on the test split, read once."""
        cell = self.cell
        if result.error is not None or result.test is not None:
            return result
        if not cell.store.fit(result.key).is_dir():  # dropped, when another rate was the best
            (result,) = make(cell, [(self, [self.place(result.lr, result.seed)])])
        delta = Delta.load(cell.store.fit(result.key))
        model, processor = self._based(result.seed), cell.loaded[1]
        scores = evaluate(model, cell.source, delta=delta, split="test", processor=processor)
        costs = {**result.costs, "feature_drift": None if self.arm.scratch else feature_drift(model, delta, processor)}
        found = replace(result, test=scores.values, costs=costs)
        cell.store.keep(found, Examples(scores.predictions, scores.references))
        return found

    def _settings(self, lr: float, seed: int) -> Settings:
        own = {self.rate: lr, "seed": seed, "pooling": self.arm.pooling}
        return Settings.of({**self.cell.study.settings, **own})

    def place(self, lr: float, seed: int) -> Result:
        """A result that has not come yet, with its key."""
        cell, recipe = self.cell, self.arm.parsed
        determines = {
            "base": cell.content,
            "recipe": self.arm.drawn(seed).to_json(),
            "scratch": self.arm.scratch,
            "data": cell.tasks[seed].fingerprint,
            "settings": asdict(self._settings(lr, seed)),
        }
        key = key_of(determines)
        task = cell.source
        return Result(
            key, cell.model, task.name, task.metric, cell.examples, self.name, str(recipe), seed, self.rate, lr
        )

    def todo(self, group: Sequence[Result]) -> Todo:
        """Settings and folder of each run."""
        store = self.cell.store
        return [(self._settings(place.lr, place.seed), store.fit(place.key)) for place in group]

    def groups(self, missing: Sequence[Result]) -> list[list[Result]]:
        """Runs that start from the same weights: all of them, or those of a seed where weights are drawn by it."""
        if not self.arm.scratch:
            return [list(missing)] if missing else []
        seeds = dict.fromkeys(place.seed for place in missing)
        return [[place for place in missing if place.seed == seed] for seed in seeds]

    def _based(self, seed: int | None) -> PreTrainedModel:
        model, _ = self.cell.loaded
        return model if seed is None or not self.arm.scratch else from_scratch(model, seed)

    def work(self, group: Sequence[Result]) -> StudyWork:
        """What runs that start from the same weights have in common."""
        cell, seed = self.cell, group[0].seed if self.arm.scratch else None
        epochs = Settings.of(cell.study.settings).epochs * len(group)
        heads: Mapping[int, Mapping[str, Tensor]] = {} if seed is None else {seed: {}}
        return StudyWork(
            self._based(seed), self.arm.parsed, cell.source, TaskLoss(), cell.loaded[1], self.rate, epochs,
            None, cell.tasks, {seed: self.arm.drawn(seed) for seed in cell.study.seeds}, heads or cell.heads,
        )  # fmt: skip

    def ended(self, place: Result, trial: Trial, delta: Delta | None) -> Result:
        """What came of a run."""
        found = replace(
            place, validation=trial.value(place.metric), scores=trial.scores, best_epoch=trial.best_epoch,
            error=trial.error, diverged=trial.error is not None and not trial.failed,
        )  # fmt: skip
        return found if delta is None else replace(found, costs=run_costs(self.cell, self.arm, place.key, trial, delta))

    def kept(self, result: Result) -> Result:
        """The same, written down and told of."""
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
