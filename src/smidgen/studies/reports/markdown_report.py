"""A report as Markdown: its summary and its numbers as tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from smidgen.studies.reports.column_layout import shown_columns
from smidgen.studies.reports.number_format import Format
from smidgen.studies.reports.report import Report
from smidgen.studies.reports.sections import HeatMap, Quotes, Section, Table, Text


def markdown(report: Report, titles: Sequence[str] | None = None) -> str:
    """The summary and the sections with these titles (all by default); bars and lines are left out."""
    parts = [f"# {report.title}", *report.summary]
    parts.append("; ".join(f"{name}: {value}" for name, value in report.facts.items()))
    for section in report.sections:
        if titles is None or section.title in titles:
            parts += _section(section)
    return "\n\n".join(part for part in parts if part)


def _section(section: Section) -> Iterator[str]:
    """A section as paragraphs of Markdown."""
    if isinstance(section, Text):
        yield f"## {section.title}"
        yield from section.paragraphs
    elif isinstance(section, Quotes):
        yield f"## {section.title}"
        for name, text in section.quotes.items():
            yield f"{name}:"
            yield _fenced(text)
        yield section.note
    elif isinstance(section, Table):
        columns = shown_columns(section)
        heads = [f"{column.name} {column.unit}".strip() for column in columns]
        cells = zip(*(column.cells for column in columns), strict=True)
        rows = [[f"{c.text} ± {c.spread}" if c.spread else c.text for c in row] for row in cells]
        yield f"## {section.title}"
        yield _table(heads, rows)
        yield section.note
    elif isinstance(section, HeatMap):
        given = [value for line in section.values for value in line]
        style = Format.of(given, section.percent)
        unit = f", {style.unit}" if style.unit else ""
        yield f"## {section.title}{unit}"
        yield _table(["", *section.columns], [
            [name, *map(style.show, line)] for name, line in zip(section.rows, section.values, strict=True)
        ])  # fmt: skip
        yield section.note


def _fenced(text: str) -> str:
    """A text word for word, between fences that are longer than any within it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
