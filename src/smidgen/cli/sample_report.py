"""What `tune` shows of a run whose model writes: report.md, and report.html where the extra for it is installed."""

from __future__ import annotations

import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import smidgen as sm
from smidgen.cli.views import results

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from smidgen.data.processor import Processor

MARKDOWN = "report.md"


def report_samples(
    out: Path, network: PreTrainedModel, processor: Processor, task: sm.Task, delta: sm.Delta, samples: int | None
) -> None:
    """Put a run's report into its folder, unless it is there. samples: how many; None for what the kind shows.

    A kind of task whose models write nothing, and a run without a validation split, have none.
    """
    count = task.task_kind.samples if samples is None else samples
    if not count or "validation" not in task.splits or (out / MARKDOWN).exists():
        return
    from smidgen.common.atomic_files import write_files
    from smidgen.data.scoring import default_metric
    from smidgen.inference.task_record import TaskRecord
    from smidgen.studies.reports.markdown_report import markdown
    from smidgen.studies.reports.tuning_run import tuning_report
    from smidgen.training.run.run_folder import RunFolder

    results.note(f"writing {count} samples for {out / MARKDOWN}, before and after")
    found = sm.write_samples(network, task, delta, count=count, processor=processor)
    plain, limit = replace(task, metric=default_metric(task.kind)), TaskRecord.of(delta.info).max_length
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what was cut has been told when the run began
        before = sm.evaluate(network, plain, split="validation", processor=processor, max_length=limit, batch_size=8)
    report = tuning_report(delta, task, RunFolder(out, writer=False).history(), before.values, found)
    if find_spec("jinja2") and find_spec("matplotlib"):
        report.write(out)
    else:
        results.note("report.html needs matplotlib and jinja2: pip install 'smidgen[report]'")
    write_files(out, {MARKDOWN: (markdown(report) + "\n").encode()})
