"""Findings: what a study's runs say, arm by arm, and arm against arm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np

from smidgen.common.json_numbers import plain
from smidgen.data.metrics import METRICS
from smidgen.studies.comparison.run_store import Examples, Result, RunStore
from smidgen.studies.comparison.study import Study
from smidgen.studies.statistics.equivalence_tests import Equivalence, equivalence
from smidgen.studies.statistics.holm_correction import holm
from smidgen.studies.statistics.paired_differences import Difference, differences, paired_difference
from smidgen.studies.statistics.per_example import mcnemar_p, permutation_p
from smidgen.studies.statistics.stratified_means import stratified_mean
from smidgen.studies.statistics.study_power import pairs_needed, smallest_difference
from smidgen.studies.statistics.summaries import Summary, summary

Size = int | None  # training examples; None for all


@dataclass(frozen=True)
class ArmFound:
    """One arm on one model, task and number of examples.

    Attributes:
        lr: the rate that was chosen on validation; None if every rate failed.
        edge: "lowest" or "highest" of those that were tried, where a better one may lie beyond.
        test: over seeds, at that rate; None if no run came to an end.
        costs: name -> mean over its runs at that rate; None where not measured.
        failed: errors of its runs.
    """

    arm: str
    model: str
    task: str
    size: Size
    metric: str
    lr: float | None
    edge: str | None
    test: Summary | None
    costs: Mapping[str, float | None]
    failed: tuple[str, ...]


@dataclass(frozen=True)
class Against:
    """One arm against the reference, on one model and number of examples: paired over tasks and seeds.

    Attributes:
        task: of this task alone; None for all tasks together.
        difference: arm minus reference, on the test split.
        holm_p, tasks_holm_p: p on these tasks, and on tasks like these, corrected for the number of arms.
        equivalence: with the study's margin.
        smallest: the true difference that a study of this size sees with 80 % probability.
        pairs_for_margin: how many pairs would see a difference as large as the margin.
        same_examples: seed -> p over the same test examples: McNemar's of accuracy, else by permutation; None where
            all answers are the same. Not of generated texts.
    """

    arm: str
    model: str
    size: Size
    task: str | None
    difference: Difference
    holm_p: float | None
    tasks_holm_p: float | None
    equivalence: Equivalence | None
    smallest: float | None
    pairs_for_margin: int | None
    same_examples: Mapping[int, float | None]


@dataclass(frozen=True, eq=False)
class Findings:
    """What is told of a study, from its results alone."""

    study: Study
    results: Sequence[Result]
    store: RunStore

    @property
    def models(self) -> list[str]:
        """In the study's order."""
        return list(dict.fromkeys(result.model for result in self.results))

    @property
    def tasks(self) -> list[str]:
        """In the study's order."""
        return list(dict.fromkeys(result.task for result in self.results))

    @property
    def sizes(self) -> list[Size]:
        """Numbers of examples, in the study's order."""
        return list(dict.fromkeys(result.examples for result in self.results))

    @property
    def metrics(self) -> dict[str, str]:
        """Task -> its metric."""
        return {result.task: result.metric for result in self.results}

    @cached_property
    def arms(self) -> list[ArmFound]:
        """Every arm in every cell."""
        cells = dict.fromkeys(result.cell for result in self.results)
        return [self._arm(name, model, task, size) for model, task, size in cells for name in self.study.arms]

    @cached_property
    def against(self) -> list[Against]:
        """Every arm but the reference, over all tasks that can be averaged, and on each of several."""
        found: list[Against] = []
        for model in self.models:
            for size in self.sizes:
                groups: list[tuple[str | None, list[str]]] = [(task, [task]) for task in self.tasks]
                if len(groups) == 1:
                    groups = [(None, self.tasks)]
                elif self.comparable:
                    groups = [(None, self.tasks), *groups]
                for task, tasks in groups:
                    found += self._against(model, size, task, tasks)
        return found

    @property
    def comparable(self) -> bool:
        """Whether the tasks' metrics are on one scale: none of them a loss, a perplexity or an error."""
        return all(METRICS[metric].higher_is_better for metric in self.metrics.values())

    def to_json(self) -> dict[str, object]:
        """Plain data: arms and differences."""
        return plain({"arms": [asdict(arm) for arm in self.arms], "against": [asdict(each) for each in self.against]})

    def chosen(self, arm: str, model: str, task: str, size: Size) -> list[Result]:
        """The runs of an arm that were tested, by seed."""
        found = [r for r in self.results if (r.arm, *r.cell) == (arm, model, task, size) and r.test is not None]
        return sorted(found, key=lambda result: self.study.seeds.index(result.seed))

    def _arm(self, name: str, model: str, task: str, size: Size) -> ArmFound:
        """One arm in one cell."""
        runs = [r for r in self.results if (r.arm, *r.cell) == (name, model, task, size)]
        tested, metric = self.chosen(name, model, task, size), self.metrics[task]
        rates = sorted({run.lr for run in runs})
        lr = tested[0].lr if tested else None
        edge = None if lr is None or len(rates) < 2 else {rates[0]: "lowest", rates[-1]: "highest"}.get(lr)
        values = [value for run in tested if math.isfinite(value := _tested(run))]
        higher = METRICS[metric].higher_is_better
        costs = _means([run.costs for run in tested])
        failed = tuple(f"lr {run.lr:g}, seed {run.seed}: {run.error}" for run in runs if run.error is not None)
        failed += tuple(
            f"lr {run.lr:g}, seed {run.seed}: {metric} on the test split is no finite number"
            for run in tested if not math.isfinite(_tested(run))
        )  # fmt: skip
        return ArmFound(
            name, model, task, size, metric, lr, edge, summary(values, higher_is_better=higher), costs, failed
        )

    def _against(self, model: str, size: Size, task: str | None, tasks: list[str]) -> Iterator[Against]:
        """Each arm but the reference, on some tasks together; p-values are corrected for the number of these arms."""
        reference, higher = self.study.against, METRICS[self.metrics[tasks[0]]].higher_is_better
        base, found = self._values(reference, model, tasks, size), []
        for arm in self.study.arms:
            if arm == reference:
                continue
            values = self._values(arm, model, tasks, size)
            difference = paired_difference(values, base)
            if difference is None:
                continue
            d = differences(values, base)
            spread = stratified_mean([row[~np.isnan(row)] for row in d])
            assert spread is not None
            pairs, groups, sd = spread.count, spread.tasks, spread.sd
            found.append(
                Against(
                    arm,
                    model,
                    size,
                    task,
                    difference,
                    None,
                    None,
                    equivalence(list(d), self.study.margin, higher_is_better=higher),
                    None if sd is None else smallest_difference(sd, pairs, groups),
                    None if sd is None else pairs_needed(sd, self.study.margin, groups),
                    self._same_examples(arm, model, tasks[0], size) if len(tasks) == 1 else {},
                )
            )
        corrected = holm({each.arm: each.difference.t_p for each in found})
        over_tasks = holm({each.arm: each.difference.tasks_p for each in found})
        yield from (replace(e, holm_p=corrected[e.arm], tasks_holm_p=over_tasks[e.arm]) for e in found)

    def _values(self, arm: str, model: str, tasks: Sequence[str], size: Size) -> list[list[float]]:
        """(tasks, seeds); nan where a run is missing, or its metric is not finite."""
        found = []
        for task in tasks:
            by_seed = {r.seed: _tested(r) for r in self.chosen(arm, model, task, size)}
            found.append([by_seed.get(seed, math.nan) for seed in self.study.seeds])
        return found

    def _same_examples(self, arm: str, model: str, task: str, size: Size) -> dict[int, float | None]:
        """p by seed over the same test examples, where the metric is fast enough to compute some hundred times."""
        metric = METRICS[self.metrics[task]]
        if metric.package is not None:
            return {}
        said = [self._said(name, model, task, size) for name in (arm, self.study.against)]
        found: dict[int, float | None] = {}
        for seed in (seed for seed in said[0] if seed in said[1]):
            one, other = said[0][seed], said[1][seed]
            if metric.name == "accuracy":
                found[seed] = mcnemar_p(one.right, other.right)
            else:
                found[seed] = permutation_p(metric.function, one.predictions, other.predictions, one.references)
        return found

    def _said(self, arm: str, model: str, task: str, size: Size) -> dict[int, Examples]:
        """Seed -> what a run with a finite metric said of each test example."""
        runs = [run for run in self.chosen(arm, model, task, size) if math.isfinite(_tested(run))]
        return {run.seed: said for run in runs if (said := self.store.examples(run.key)) is not None}


def _tested(run: Result) -> float:
    """Its metric on the test split; nan where that is no finite number."""
    value = None if run.test is None else run.test[run.metric]
    return value if value is not None and math.isfinite(value) else math.nan


def _means(costs: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Mean of each cost over runs; None where one was not measured."""
    found: dict[str, float | None] = {}
    for name in dict.fromkeys(key for each in costs for key in each):
        values = [each.get(name) for each in costs]
        known = [value for value in values if value is not None]
        found[name] = float(np.mean(known)) if known and len(known) == len(values) else None
    return found


def ahead(one: Result, other: Result) -> bool:
    """Whether a run is better than another of its cell on validation."""
    if one.validation is None or other.validation is None:
        return other.validation is None
    higher = METRICS[one.metric].higher_is_better
    return one.validation > other.validation if higher else one.validation < other.validation
