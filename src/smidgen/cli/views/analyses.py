"""What analyses look like in a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from smidgen.cli.views import results
from smidgen.studies.reports.column_layout import Shown, shown_columns

if TYPE_CHECKING:
    from smidgen.delta.saved_selection import Selection
    from smidgen.studies.reports.report import Report
    from smidgen.studies.reports.sections import Table as Numbers


def report_view(result: Report, shown: Sequence[str], out: Path | None) -> RenderableType:
    """A report in a terminal: its summary, those of its tables whose titles are given, and where the rest is."""
    parts: list[RenderableType] = [Text(result.title, style="bold")]
    for section in result.sections:
        if section.title in shown and section.kind == "table":
            parts += [Text(f"\n{section.title}"), numbers(section)]  # type: ignore[arg-type]
    parts += [Text(paragraph + "\n") for paragraph in result.summary]
    if out is not None:
        parts += [results.listing(out), Text(f"open {shlex.quote(str(out / 'report.html'))}", style="dim")]
    return Group(*parts)


def selection_view(selection: Selection, out: Path) -> RenderableType:
    """A selection: how much of each tensor it keeps."""
    rows = [
        (name, f"{len(index):,}", f"{float(selection.mask(name).float().mean()):.0%}")
        for name, index in selection.indices.items()
        if len(index)
    ]
    kept = Text(f"keeps {selection.kept:,} of {selection.candidates:,} values", style="bold")
    return Group(kept, results.table(("tensor", "#kept", "#share"), rows), results.listing(out))


def numbers(section: Numbers) -> Table:
    """A report's table; the best number of a column stands out."""
    columns = shown_columns(section)
    heads = [f"{'#' if column.number else ''}{column.name}\n{column.unit}".rstrip("\n") for column in columns]
    table = results.table(heads, [])
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(_text, row))
    return table


def _text(cell: Shown) -> Text:
    text = Text(cell.text, style="bold" if cell.best else "")
    return text.append(f" ± {cell.spread}", style="dim") if cell.spread else text
