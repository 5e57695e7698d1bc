"""A comparison as a report: scores, differences with intervals and verdicts, costs, rates, sizes."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence

from smidgen.common.atomic_files import write_files
from smidgen.data.metrics import METRICS
from smidgen.studies.comparison.comparing import StudyRuns
from smidgen.studies.comparison.findings import Against, ArmFound, Findings, Size
from smidgen.studies.reports.comparison_charts import (
    cost_fronts,
    difference_intervals,
    epoch_curves,
    rate_curves,
    size_curves,
    size_name,
    where_name,
)
from smidgen.studies.reports.markdown_report import markdown
from smidgen.studies.reports.parameter_changes import short_name
from smidgen.studies.reports.report import Report
from smidgen.studies.reports.sections import Cell, Column, Section, Table, Text

COSTS = {
    "trained_values": "values trained",
    "head_values": "values of the head",
    "file_bytes": "file, bytes",
    "seconds": "seconds a run",
    "examples_per_second": "examples a second",
    "step_bytes": "memory of a step, bytes",
    "flops_per_token": "training FLOPs a token",
    "average_memory_bytes": "average memory, bytes",
    "cpu_utilisation": "compute utilisation",
    "average_power_watts": "average power, watts",
    "feature_drift": "drift of the base's features",
}
RULES = (
    "Held equal in all arms: training and validation examples, batches and their order, epochs, schedule, the start "
    "and the rate of the head, and the number of rates that are tried. Rates and epochs are chosen on the validation "
    "split; the test split is read once, with the rate that was chosen."
)
LIKE_THESE = "“On tasks like these”: the tasks as a sample of others, by the t distribution on their means. "
FIELDS = ("model", "task", "examples", "arm", "recipe", "seed", "rate", "lr", "metric", "validation", "test", "error")


def comparison_report(found: Findings, command: str = "") -> Report:
    """The report of a study's results."""
    study = found.study
    return Report(
        title=study.name,
        summary=list(_summary(found)),
        sections=list(_sections(found)),
        facts=_facts(found),
        command=command,
        data={"study": study.model_dump(mode="json")},
    )


def write_report(found: StudyRuns, command: str = "") -> Findings:
    """Write report.html, report.json, report.md, results.csv and the charts into the study's folder.

    Raises:
        ReportError: matplotlib or jinja2 is missing.
        WriteError: the folder cannot be written, or the disk is full.
    """
    findings = Findings(found.study, found.results, found.store)
    report = comparison_report(findings, command)
    out = found.store.path
    report.write(out)
    text = {"report.md": markdown(report) + "\n", "results.csv": results_csv(findings)}
    write_files(out, {name: content.encode() for name, content in text.items()})
    found.store.place.send(path.name for path in out.iterdir() if path.is_file())
    return findings


def score_cells(found: Findings) -> tuple[str, list[str], list[list[str]]]:
    """Title, head and rows of scores for a terminal: model and size where there are several."""
    rows = []
    for arm in found.arms:
        score = "–" if arm.test is None else f"{arm.test.mean:.4f}"
        spread = "" if arm.test is None or arm.test.sd is None else f"± {arm.test.sd:.4f}"
        values = arm.costs.get("trained_values")
        rate = "–" if arm.lr is None else f"{arm.lr:g}"
        shown = "–" if values is None else f"{values:,.0f}"
        rows.append([f"{arm.task}{where_name(found, arm.model, arm.size)}", arm.arm, rate, score, spread, shown])
    return "Test", ["task", "arm", "#rate", "#score", "#sd", "#values trained"], rows


def difference_cells(found: Findings) -> tuple[str, list[str], list[list[str]]]:
    """The same of differences from the reference."""
    rows = []
    for each in found.against:
        task = ("all" if len(found.tasks) > 1 else found.tasks[0]) if each.task is None else each.task
        p = "–" if each.holm_p is None else f"{each.holm_p:.2g}"
        where = f"{task}{where_name(found, each.model, each.size)}"
        rows.append([where, each.arm, _difference(each), p, _verdict(found, each)])
    return f"Against {found.study.against}", ["task", "arm", "#points, 95 %", "#p (Holm)", "verdict"], rows


def results_csv(found: Findings) -> str:
    """A row for each run."""
    text = io.StringIO()
    costs = list(dict.fromkeys(name for result in found.results for name in result.costs))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*FIELDS, *costs])
    for run in found.results:
        own: dict[str, object] = {name: getattr(run, name) for name in FIELDS}
        own |= {"examples": run.examples or "all", "test": None if run.test is None else run.test[run.metric]}
        writer.writerow([*own.values(), *(run.costs.get(name) for name in costs)])
    return text.getvalue()


def _facts(found: Findings) -> dict[str, str]:
    study = found.study
    return {
        "Models": ", ".join(map(short_name, found.models)),
        "Tasks": ", ".join(f"{task} ({metric})" for task, metric in found.metrics.items()),
        "Examples": ", ".join(map(size_name, found.sizes)),
        "Seeds": ", ".join(map(str, study.seeds)),
        "Rates tried": f"{study.rates_each} for each arm, with {study.tuning_seeds} of the seeds",
        "Runs": f"{len(found.results):,}",
    }


def _summary(found: Findings) -> Iterator[str]:
    """What was found, in sentences."""
    study, overall = found.study, _overall(found)
    for each in overall:
        yield _sentence(found, each)
    if not overall:
        yield "No arm has a run beside one of the reference's, so that nothing can be compared."
    if len(study.seeds) == 1:
        yield "One seed: what is seen may be chance, and no interval can be given."
    failed = [result for result in found.results if result.error is not None]
    if failed:
        yield f"{len(failed):,} of {len(found.results):,} runs failed; see the last section."


def _overall(found: Findings) -> list[Against]:
    """Over all tasks, with the most examples; task by task where they cannot be averaged."""
    largest = max(found.sizes, key=lambda size: math.inf if size is None else size)
    kept = [each for each in found.against if each.size == largest]
    over_all = [each for each in kept if each.task is None]
    return over_all or kept


def _sentence(found: Findings, each: Against) -> str:
    at = f" on {short_name(each.model)}" if len(found.models) > 1 else ""
    at += f" on {each.task}" if each.task is not None else ""
    shown = _difference(each)
    verdict = _verdict(found, each)
    return f"{each.arm} against {found.study.against}{at}: {shown} points; {verdict}."


def _difference(each: Against) -> str:
    interval = each.difference.interval
    around = f" ({_points(interval)})" if interval else ""
    return f"{100 * each.difference.mean:+.1f}".replace("-", "−") + around


def _points(interval: tuple[float, float]) -> str:
    """An interval in hundredths of the metric."""
    low, high = interval
    return f"{100 * low:+.1f} to {100 * high:+.1f}".replace("-", "−")


def _verdict(found: Findings, each: Against) -> str:
    margin = f"{100 * found.study.margin:g}"
    if each.equivalence is None:
        return each.difference.why or "too few runs to tell"
    if each.equivalence.verdict == "equivalent":
        return f"equal within {margin} points"
    if each.equivalence.verdict == "cannot tell":
        need = "" if each.pairs_for_margin is None else f", {each.pairs_for_margin:,} pairs would"
        return f"cannot tell: {each.difference.pairs} pairs do not settle {margin} points{need}"
    return each.equivalence.verdict


def _sections(found: Findings) -> Iterator[Section]:
    """The sections of the report, in order."""
    for model in found.models:
        for size in found.sizes:
            yield from _cell_sections(found, model, size)
    if len(found.sizes) > 1:
        yield from size_curves(found)
    yield from rate_curves(found)
    yield from epoch_curves(found)
    yield Text("Rules", [RULES, *_notes(found)])
    failed = [(arm, line) for arm in found.arms for line in arm.failed]
    if failed:
        rows: list[list[Cell]] = [[a.arm, short_name(a.model), a.task, size_name(a.size), line] for a, line in failed]
        columns = [Column(name) for name in ("arm", "model", "task", "examples", "what happened")]
        yield Table("Runs that failed", columns=columns, rows=rows)


def _cell_sections(found: Findings, model: str, size: Size) -> Iterator[Section]:
    """Scores, differences, fronts and costs on one model and number of examples."""
    where = where_name(found, model, size)
    arms = {
        name: [a for a in found.arms if (a.arm, a.model, a.size) == (name, model, size)] for name in found.study.arms
    }
    columns = [Column("arm"), Column("rate"), *(Column(f"{task} {metric}", _best(metric), percent=found.comparable)
                                                for task, metric in found.metrics.items())]  # fmt: skip
    rows: list[list[Cell]] = []
    for name, each in arms.items():
        rates = ", ".join(dict.fromkeys("–" if a.lr is None else f"{a.lr:g}" for a in each))
        rows.append([name, rates, *(_score(a) for a in each)])
    note = "Mean over seeds on the test split, standard deviation behind it."
    yield Table(f"Scores{where}", columns=columns, rows=rows, note=note)
    yield from _differences(found, model, size, where)
    yield from cost_fronts(found, arms, where)
    yield _costs(arms, where)


def _best(metric: str) -> str:
    return "max" if METRICS[metric].higher_is_better else "min"


def _score(arm: ArmFound) -> Cell:
    if arm.test is None:
        return None
    return arm.test.mean if arm.test.sd is None else (arm.test.mean, arm.test.sd)


def _differences(found: Findings, model: str, size: Size, where: str) -> Iterator[Section]:
    """Every arm against the reference: over all tasks, and task by task; and what stands behind the verdicts."""
    rows: list[list[Cell]] = []
    behind: list[list[Cell]] = []
    here = [each for each in found.against if (each.model, each.size) == (model, size)]
    several = any(each.difference.tasks_interval for each in here)
    for each in here:
        p = "–" if each.holm_p is None else f"{each.holm_p:.2g}"
        smallest = "–" if each.smallest is None else f"{100 * each.smallest:.1f}"
        task = "all" if each.task is None else each.task
        same = ", ".join("–" if value is None else f"{value:.2g}" for value in each.same_examples.values())
        rows.append([each.arm, task, _difference(each), p, _verdict(found, each)])
        more: list[Cell] = [each.arm, task, str(each.difference.pairs), smallest, same or "–"]
        behind.append([*more, _on_other_tasks(each)] if several else more)
    if not rows:
        return
    columns = [Column(name) for name in ("arm", "tasks", "points", "p (Holm)", "verdict")]
    note = (
        f"Each arm minus {found.study.against}, paired by task and seed, in hundredths of the metric; 95 % bootstrap "
        "intervals over seeds, the tasks being what they are; t-tests over seeds within tasks, corrected by Holm over "
        "the arms; equality by two one-sided tests."
    )
    yield Table(f"Against {found.study.against}{where}", columns=columns, rows=rows, note=note)
    yield from difference_intervals(found, model, size, where)
    names = ["arm", "tasks", "pairs", "could have seen, points", "p by seed, same examples"]
    note = (
        "“Could have seen”: the true difference that so many pairs see with 80 % probability. “Same examples”: "
        "McNemar's test of accuracy, else a permutation test. "
    )
    columns = [Column(name) for name in (*names, *(["points on tasks like these"] if several else []))]
    yield Table(
        f"Behind the verdicts{where}", columns=columns, rows=behind, note=note + (LIKE_THESE if several else "")
    )


def _on_other_tasks(each: Against) -> str:
    """What the tasks, as a sample, say of others."""
    interval, p = each.difference.tasks_interval, each.tasks_holm_p
    return "–" if interval is None else f"{_points(interval)}" + ("" if p is None else f", p {p:.2g}")


def _costs(arms: Mapping[str, Sequence[ArmFound]], where: str) -> Section:
    """What the arms take, on average over tasks."""
    names = [name for name in COSTS if any(name in a.costs for each in arms.values() for a in each)]
    rows: list[list[Cell]] = []
    for arm, each in arms.items():
        row: list[Cell] = [arm]
        for name in names:
            known = [value for a in each if (value := a.costs.get(name)) is not None]
            row.append(sum(known) / len(known) if known and len(known) == len(each) else "not measured")
        rows.append(row)
    note = (
        "Seconds, memory and utilisation are those of the process that ran; runs that share cached states of frozen "
        "layers are faster after the first. Step memory and FLOPs are counted exactly by smidgen plan. Drift: mean "
        "relative change of the last hidden states on texts of another task."
    )
    return Table(
        f"Costs{where}", columns=[Column("arm"), *(Column(COSTS[name]) for name in names)], rows=rows, note=note
    )


def _notes(found: Findings) -> Iterator[str]:
    edges = [f"{a.arm} on {a.task} ({a.edge})" for a in found.arms if a.edge is not None]
    if edges:
        said = "The best rate lies at an end of those that were tried, so that a better one may lie beyond"
        yield f"{said}: {'; '.join(edges)}."
