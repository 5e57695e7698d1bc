"""Trust in a selection as a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from smidgen.studies.experiments.fisher_stability import OUTLIER, Trust
from smidgen.studies.reports.parameter_changes import short_name
from smidgen.studies.reports.report import Report
from smidgen.studies.reports.sections import Bars, Cell, Column, Lines, Section, Table, Text, mean_cell

AGREED = 0.9


def trust_report(result: Trust, command: str = "") -> Report:
    """How a selection changes with the number of examples, the head and the kind of Fisher information."""
    facts = {"Model": short_name(result.model), "Task": result.task, "Recipe": result.recipe}
    return Report(
        title=f"How far to trust a selection on {result.task}",
        summary=list(_summary(result)),
        sections=list(_sections(result)),
        facts={**facts, "Overlap by chance": f"{result.chance:.2f}"},
        command=command,
        data=result.to_json(),
    )


def _summary(result: Trust) -> Iterator[str]:
    """What was found, in sentences."""
    needed = result.examples_needed(AGREED)
    if needed is None:
        most, last = result.enough[-1], float(np.mean(result.draws[-1]))
        yield f"Even {most:,} examples are not enough for two draws to agree on {AGREED:.0%}: they agree on {last:.0%}."
    else:
        yield f"{needed:,} examples are enough here: two draws of so many agree on {AGREED:.0%} of what they select."
    heads, warmed = float(np.mean(result.heads)), float(np.mean(result.warmed))
    yield (
        f"With heads drawn from different seeds selections agree on {heads:.0%}; once each head is trained alone, "
        f"on {warmed:.0%}. Training the head changes the selection itself: fresh and trained agree on "
        f"{np.mean(result.fresh_to_warmed):.0%}."
    )


def _sections(result: Trust) -> Iterator[Section]:
    """The sections of the report, in order."""
    rows: list[list[Cell]] = [
        [count, mean_cell(draws), mean_cell(reference)]
        for count, draws, reference in zip(result.enough, result.draws, result.reference, strict=True)
    ]
    columns = [Column("examples"), Column("two draws of so many"), Column(f"with {result.enough[-1]:,} examples")]
    note = "Where the train split is small, independent draws share examples, and agree more for it."
    yield Table("How many examples are enough", columns, rows, note=note)
    series = {"two draws": _band(result.draws), f"with {result.enough[-1]:,}": _band(result.reference)}
    yield Lines("Overlap by number of examples", result.enough, series, "examples", "overlap", log=False)
    rows = [
        ["fresh heads of different seeds", mean_cell(result.heads)],
        ["trained heads of different seeds", mean_cell(result.warmed)],
        ["fresh with trained head, same seed", mean_cell(result.fresh_to_warmed)],
    ]
    rows += [[f"{kind} with empirical, trained head", value] for kind, value in result.kinds.items()]
    rows.append(["two random selections", result.chance])
    yield Table("What the selection depends on", [Column("compared"), Column("overlap")], rows)
    yield from _masses(result)
    inside, among = result.outliers
    yield Text("Outliers", (
        f"{inside:.1%} of the selected values are outliers of the pretrained model (more than {OUTLIER:g} standard "
        f"deviations from the mean of their tensor); of all values {among:.1%} are.",
    ))  # fmt: skip


def _masses(result: Trust) -> Iterator[Section]:
    places = list(next(iter(result.mass.values())))
    rows: list[list[Cell]] = [[place, *(found.get(place) for found in result.mass.values())] for place in places]
    columns = [Column("layer or term"), *(Column(head, percent=True) for head in result.mass)]
    yield Table("Where the mass lies", columns, rows)
    trained = list(result.mass.values())[-1]
    yield Bars("Share of mass, trained head", places, [trained.get(p) for p in places], unit="share", percent=True)


def _band(found: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    spreads = [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for values in found]
    return [float(np.mean(values)) for values in found], spreads
