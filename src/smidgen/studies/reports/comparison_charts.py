"""Charts of a comparison: scores against costs, over numbers of examples, and over rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

from smidgen.data.metrics import METRICS
from smidgen.studies.comparison.findings import ArmFound, Findings, Size
from smidgen.studies.comparison.run_store import Result
from smidgen.studies.reports.parameter_changes import short_name
from smidgen.studies.reports.sections import Intervals, Lines, Number, Points, Section


def size_name(size: Size) -> str:
    """A number of examples in words."""
    return "all" if size is None else f"{size:,}"


def where_name(found: Findings, model: str, size: Size) -> str:
    """A model and a number of examples for a title, as far as there are several."""
    parts = [short_name(model)] * (len(found.models) > 1) + [f"{size_name(size)} examples"] * (len(found.sizes) > 1)
    return f", {', '.join(parts)}" if parts else ""


def cost_fronts(found: Findings, arms: Mapping[str, Sequence[ArmFound]], where: str) -> Iterator[Section]:
    """Mean over tasks against what is trained and how long it takes."""
    across_of = {"trained_values": "values trained, head apart", "seconds": "seconds a run"}
    for cost, across in across_of.items():
        for task in [None] if found.comparable else found.tasks:
            points: dict[str, tuple[float, float, Number]] = {}
            for name, each in arms.items():
                kept = [a for a in each if task is None or a.task == task]
                values = [a.test.mean for a in kept if a.test is not None]
                taken = [a.costs.get(cost) for a in kept]
                known = [value for value in taken if value is not None]
                if kept and len(values) == len(known) == len(kept):
                    points[name] = (sum(known) / len(known), sum(values) / len(values), None)
            title = f"{'Score' if task is None else task} against {across}{where}"
            metric = found.metrics[task or found.tasks[0]]
            unit = "mean over tasks" if task is None and len(found.tasks) > 1 else metric
            higher, log = METRICS[metric].higher_is_better, cost == "trained_values"
            if len(points) > 1:
                yield Points(title, points=points, across=across, unit=unit, log_x=log, more_is_better=higher)


def difference_intervals(found: Findings, model: str, size: Size, where: str) -> Iterator[Section]:
    """Each arm's difference from the reference, over all tasks and task by task, in hundredths of the metric."""
    here = [each for each in found.against if (each.model, each.size) == (model, size)]
    several = any(each.task is not None for each in here)
    intervals: dict[str, tuple[float, Number, Number]] = {}
    groups = {}
    for arm in found.study.arms:
        for each in (each for each in here if each.arm == arm):
            label = f"{arm}, {each.task or 'all tasks'}" if several else arm
            low, high = each.difference.interval or (None, None)
            ends = (None, None) if low is None or high is None else (100 * low, 100 * high)
            intervals[label] = (100 * each.difference.mean, *ends)
            groups[label] = arm
    if intervals:
        yield Intervals(
            f"Differences from {found.study.against}{where}", intervals=intervals, groups=groups,
            margin=100 * found.study.margin, unit="points", note="95 % intervals; the band is the margin.",
        )  # fmt: skip


def epoch_curves(found: Findings) -> Iterator[Section]:
    """Validation over epochs, at the rates that were chosen: mean over seeds."""
    for model, task, size in dict.fromkeys(result.cell for result in found.results):
        metric, series = found.metrics[task], dict[str, tuple[Sequence[Number], Sequence[Number]]]()
        for name in found.study.arms:
            curves = [[scores[metric] for scores in run.scores] for run in found.chosen(name, model, task, size)]
            if any(curves):
                series[name] = ([_mean(column) for column in zip_longest(*curves)], ())
        epochs = max((len(values) for values, _ in series.values()), default=0)
        if epochs > 1:
            whole = {name: ([*values, *[None] * (epochs - len(values))], ()) for name, (values, _) in series.items()}
            title = f"Validation over epochs, {task}{where_name(found, model, size)}"
            yield Lines(title, x=list(map(float, range(1, epochs + 1))), series=whole, across="epoch", unit=metric)


def size_curves(found: Findings) -> Iterator[Section]:
    """Scores over numbers of examples."""
    for model in found.models:
        for task in found.tasks:
            here = [a for a in found.arms if (a.model, a.task) == (model, task)]
            whole = _trained_on(found, task)
            sizes = sorted({whole if a.size is None else float(a.size) for a in here})
            series: dict[str, tuple[Sequence[Number], Sequence[Number]]] = {}
            for name in found.study.arms:
                by_size = {whole if a.size is None else float(a.size): a.test for a in here if a.arm == name}
                tests = [by_size.get(size) for size in sizes]
                series[name] = ([t.mean if t else None for t in tests], [t.sd or 0.0 if t else 0.0 for t in tests])
            at = f" on {short_name(model)}" if len(found.models) > 1 else ""
            yield Lines(f"{task}{at} over examples", x=sizes, series=series, log_x=True,
                        across="training examples", unit=found.metrics[task])  # fmt: skip


def _trained_on(found: Findings, task: str) -> float:
    """How many examples "all" are, as the runs on them tell."""
    counts = (r.costs.get("train_examples") for r in found.results if r.task == task and r.examples is None)
    return next((count for count in counts if count), 1.0)


def rate_curves(found: Findings) -> Iterator[Section]:
    """Validation over rates, of the seeds that tried them."""
    tuning = found.study.seeds[: found.study.tuning_seeds]
    for model in found.models:
        for task in found.tasks:
            for size in found.sizes:
                runs = [r for r in found.results if r.cell == (model, task, size) and r.seed in tuning]
                rates = sorted({run.lr for run in runs})
                if len(rates) < 2:
                    continue
                series = {name: (_by_rate(runs, name, rates), ()) for name in found.study.arms}
                title = f"Validation over rates, {task}{where_name(found, model, size)}"
                yield Lines(title, x=rates, series=series, log_x=True, across="learning rate", unit=found.metrics[task])


def _by_rate(runs: Sequence[Result], arm: str, rates: Sequence[float]) -> list[Number]:
    return [_mean([run.validation for run in runs if (run.arm, run.lr) == (arm, lr)]) for lr in rates]


def _mean(values: Sequence[float | None]) -> Number:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
