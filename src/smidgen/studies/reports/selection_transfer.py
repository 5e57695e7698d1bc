"""Carry-over as a report."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from smidgen.studies.experiments.selection_transfer import ARMS, Transfer
from smidgen.studies.reports.parameter_changes import short_name
from smidgen.studies.reports.report import Report
from smidgen.studies.reports.sections import Cell, Column, HeatMap, Section, Table, Text, mean_cell

TITLES = {"own": "own choice", "transferred": "the others' choice", "random": "random", "all": "everything"}


def transfer_report(result: Transfer, command: str = "") -> Report:
    """Overlaps of what tasks select, and what each makes of its own, the others', a random and no selection."""
    return Report(
        title=f"Do selections carry over from task to task on {short_name(result.model)}?",
        summary=list(_summary(result)),
        sections=list(_sections(result)),
        facts=_facts(result),
        command=command,
        data=result.to_json(),
    )


def score_gaps(result: Transfer, arm: str, other: str) -> list[float]:
    """Metric of one arm less that of another, for every target and seed (the same head and data in both)."""
    found = []
    for target in result.carried:
        found += [a - b for a, b in zip(result.values(target, arm), result.values(target, other), strict=True)]
    return found


def _summary(result: Transfer) -> Iterator[str]:
    """What was found, in sentences."""
    overlap = [value for found in result.carried.values() for value in found]
    yield (
        f"On average {np.mean(overlap):.0%} of what a task selects for itself is also in what the other tasks select "
        f"together; two random selections would share {result.chance:.0%}."
    )
    own, random = score_gaps(result, "transferred", "own"), score_gaps(result, "transferred", "random")
    yield (
        f"The others' choice is {_points(own)} points from the task's own and {_points(random)} points from a random "
        f"one (mean over {len(own)} runs of each, standard deviation behind it)."
    )


def _points(found: list[float]) -> str:
    spread = f" ± {100 * float(np.std(found, ddof=1)):.1f}" if len(found) > 1 else ""
    return f"{100 * float(np.mean(found)):+.1f}{spread}".replace("-", "−")


def _facts(result: Transfer) -> dict[str, str]:
    facts = {"Model": short_name(result.model), "Recipe": result.recipe, "Combined by": result.how}
    trained = {run["trained"] for run in result.outcomes if run["arm"] != "all"}
    values = ", ".join(f"{count:,}" for count in sorted(trained))
    return {**facts, "Tasks": ", ".join(result.tasks), "Seeds": str(len(result.seeds)), "Values trained": values}


def _sections(result: Transfer) -> Iterator[Section]:
    """The sections of the report, in order."""
    rows: list[list[Cell]] = []
    for target in result.carried:
        cells = [mean_cell(result.values(target, arm)) for arm in ARMS]
        rows.append([f"{target} ({_metric(result, target)})", *cells, mean_cell(result.carried[target])])
    columns = [Column("left out"), *(Column(TITLES[arm]) for arm in ARMS), Column("overlap, own with others'")]
    note = "Mean over seeds, standard deviation behind it. The head, data and steps are the same in all arms."
    yield Table("What the task left out makes of each selection", columns, rows, note=note)
    rows = []
    for arm, other in (("transferred", "own"), ("transferred", "random"), ("own", "random"), ("own", "all")):
        found = score_gaps(result, arm, other)
        better = sum(gap > 0 for gap in found)
        rows.append([f"{TITLES[arm]} less {TITLES[other]}", mean_cell(found), f"{better} of {len(found)}"])
    yield Table("Differences, paired by task and seed", [Column("arms"), Column("mean"), Column("above 0")], rows)
    matrix = np.mean(result.overlaps, axis=0).tolist()
    note = f"Values that both keep over values that one keeps, mean over seeds. By chance: {result.chance:.2f}."
    yield HeatMap("Overlap of the tasks' own selections", result.tasks, result.tasks, matrix, "overlap", note=note)
    yield Text("How to read this", (
        "Each task is left out in turn. The others' scores are combined and trimmed to the same number of values, so "
        "that a larger union cannot win by its size. A selection carries over if the others' choice does as well as "
        "the task's own; it was worth making if both do better than random.",
    ))  # fmt: skip


def _metric(result: Transfer, task: str) -> str:
    return next(run["metric"] for run in result.outcomes if run["task"] == task)
