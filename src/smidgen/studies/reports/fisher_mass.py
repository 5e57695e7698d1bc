"""Fisher mass as a report."""

from __future__ import annotations

from collections.abc import Iterator

from smidgen.studies.experiments.fisher_mass import FisherMass, Mass
from smidgen.studies.experiments.model_components import TERMS, Key, stack_names
from smidgen.studies.reports.parameter_changes import norm_groups, short_name, spans_powers
from smidgen.studies.reports.report import Report
from smidgen.studies.reports.sections import Bars, Cell, Column, HeatMap, Section, Table, Text

TOP = 15
NUMBERS = (Column("share of mass", best="max", percent=True), Column("mean per value", best="max"), Column("values"))


def fisher_report(result: FisherMass, command: str = "") -> Report:
    """Total mass and mean per value side by side: by component, term and layer."""
    return Report(
        title=f"Where Fisher information lies in {short_name(result.model)}",
        summary=[_summary(result)],
        sections=list(_sections(result)),
        facts=_facts(result),
        command=command,
        data=result.to_json(),
    )


def _summary(result: FisherMass) -> str:
    table = result.table()
    most, densest = result.ranking("total")[0], result.ranking("mean")[0]
    text = f"The {most} holds most of the Fisher information: {table[most,].share:.0%} of what was measured"
    text += f", with {table[most,].values:,} values."
    if densest == most:
        return f"{text} It also has most per value."
    ratio = table[densest,].mean / table[most,].mean
    return f"{text} Per value the {densest} has most: {ratio:,.1f} times as much, in {table[densest,].values:,} values."


def _facts(result: FisherMass) -> dict[str, str]:
    facts = {"Model": short_name(result.model), "Task": result.task, "Fisher": result.kind}
    facts |= {str(key).capitalize(): str(value) for key, value in result.info.items() if value is not None}
    return {k: v for k, v in facts.items() if v} | {"Values measured": f"{sum(result.sizes):,}"}


def _sections(result: FisherMass) -> Iterator[Section]:
    """The sections of the report, in order."""
    yield Table("By component", [Column("component"), *NUMBERS], _rows(result, "component"))
    for of, title, unit in (("share", "Total mass", "share of mass"), ("mean", "Mean per value", "mean per value")):
        yield _bars(result, of, title, unit)
    yield Table("By term", [Column("term"), *NUMBERS], _rows(result, "term"))
    yield Table("By component and term", [Column("component"), Column("term"), *NUMBERS], _terms(result))
    if any(part.layer is not None for part in result.parts):
        yield _heat(result, "share")
        yield _heat(result, "mean")
    yield _tensors(result)
    yield Text("How to read this", (
        "Total mass is the sum of the squared gradients over a group's values: it grows with the number of values. The "
        "mean per value does not, so the two rank components differently; both are shown.",
        "Fisher information depends on the scale of the parameters: with a value measured in other units, it would be "
        "another number. Comparisons of norm gains (near 1) with dense weights (near 0.03) are therefore comparisons "
        "of coordinates as they are. Values of one tensor are compared fairly.",
    ))  # fmt: skip


def _rows(result: FisherMass, by: str) -> list[tuple[Cell, ...]]:
    return [_row(key, mass) for key, mass in result.table((by,)).items()]


def _terms(result: FisherMass) -> list[tuple[Cell, ...]]:
    order, table = result.components, result.table(("component", "term"))
    return [_row(key, table[key]) for key in sorted(table, key=lambda k: (order.index(k[0]), TERMS.index(k[1])))]


def _row(key: Key, mass: Mass) -> tuple[Cell, ...]:
    return (*key, mass.share, mass.mean, mass.values)


def _bars(result: FisherMass, of: str, title: str, unit: str) -> Bars:
    table = result.table()
    labels = result.ranking("total" if of == "share" else of)
    values, share = [getattr(table[label,], of) for label in labels], of == "share"
    return Bars(title, labels, values, unit=unit, percent=share, groups=norm_groups(labels))


def _heat(result: FisherMass, of: str) -> HeatMap:
    cells, names = result.table(("component", "stack", "layer")), stack_names(result.parts)
    places = sorted({key[1:] for key in cells if key[2] is not None}, key=lambda p: (list(names).index(p[0]), p[1]))
    rows = [name for name in result.components if any(key[0] == name and key[2] is not None for key in cells)]
    values = [[getattr(cells.get((row, *place)), of, None) for place in places] for row in rows]
    columns, groups = [str(layer) for _, layer in places], [names[stack] for stack, _ in places]
    title, unit = {"share": ("Share of mass by layer", "share"), "mean": ("Mean per value by layer", "mean")}[of]
    log, share = spans_powers(values), of == "share"
    return HeatMap(title, rows, columns, values, unit, "layer, from the input", log, share, groups)


def _tensors(result: FisherMass) -> Table:
    table = result.table(("name", "component", "term"))
    largest = sorted(table, key=lambda key: -table[key].total)[:TOP]
    rows = [(*key, table[key].share, table[key].mean, table[key].values) for key in largest]
    columns = [Column("tensor"), Column("component"), Column("term"), *NUMBERS]
    return Table("The tensors with most mass", columns, rows)
