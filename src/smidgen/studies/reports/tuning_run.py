"""The report of one run: its validations, epoch by epoch, and what is written before and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from smidgen.data.metrics import METRICS
from smidgen.data.task import Task
from smidgen.delta.delta import Delta
from smidgen.inference.written_samples import WrittenSample
from smidgen.studies.reports.report import Report
from smidgen.studies.reports.sections import Column, Quotes, Section, Table
from smidgen.training.run.progress import Validation


def tuning_report(
    delta: Delta,
    task: Task,
    history: Sequence[Validation],
    before: Mapping[str, float],
    samples: Sequence[WrittenSample],
) -> Report:
    """A run in one page.

    Args:
        history: the run's validations.
        before: the base's scores on the same split.
        samples: of that split.
    """
    best, settings = delta.info.get("best_epoch"), delta.info.get("settings", {})
    rows = ", ".join(f"{len(split):,} {name}" for name, split in task.splits.items())
    facts = {
        "base": f"{delta.base.name or delta.base.architecture} ({delta.base.quantised or delta.base.dtype})",
        "trained values": f"{delta.trained:,}",
        "data": f"{task.name}: {rows}",
        **{f"from {s.name}": _taken(s.weight, s.rows) for s in task.sources},
        "settings": ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None),
    }
    score = next((entry.scores for entry in history if entry.epoch == best), {})
    told = [f"{name} {before[name]:.4g} before, {score[name]:.4g} after" for name in score if name in before]
    kept = f"The state after epoch {best} is kept, the best of {len(history)} on the validation split"
    summary = [f"{kept}: {', '.join(told)}."] if told else []
    sections: list[Section] = [_validations(history, before)] if history else []
    sections += [_sample(number, sample) for number, sample in enumerate(samples, 1)]
    data = {"samples": [asdict(sample) for sample in samples], "before": dict(before)}
    return Report(f"{delta.recipe} on {task.name}", summary, sections, facts, data=data)


def _taken(weight: float | None, rows: Mapping[str, int]) -> str:
    counts = ", ".join(f"{count:,} {split}" for split, count in rows.items())
    return f"weight {weight:g}: {counts}" if weight is not None else f"all: {counts}"


def _validations(history: Sequence[Validation], before: Mapping[str, float]) -> Table:
    names = list(dict.fromkeys(name for entry in history for name in entry.scores))
    columns = [Column("epoch"), *(Column(name, "max" if METRICS[name].higher_is_better else "min") for name in names)]
    first = ["before", *(before.get(name) for name in names)]
    rows = [first, *([str(entry.epoch), *(entry.scores.get(name) for name in names)] for entry in history)]
    return Table("Validation", columns, rows)


def _sample(number: int, sample: WrittenSample) -> Quotes:
    quotes = {"prompt": sample.asked, "reference": sample.right, "before": sample.before, "after": sample.after}
    return Quotes(f"Sample {number}", quotes)
