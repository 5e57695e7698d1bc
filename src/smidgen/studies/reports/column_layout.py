"""Columns of numbers as text: what a table looks like on a page and in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from smidgen.studies.reports.number_format import Format
from smidgen.studies.reports.sections import Cell, Column, Table


@dataclass(frozen=True)
class Shown:
    """One cell: its text, its spread ("" without one), and whether it is the column's best."""

    text: str
    spread: str = ""
    best: bool = False


@dataclass(frozen=True)
class ShownColumn:
    """A column's head, unit and cells; `number` says that it is aligned to the right."""

    name: str
    unit: str
    number: bool
    cells: tuple[Shown, ...]


def shown_columns(table: Table) -> list[ShownColumn]:
    """The columns of a table as text; a column with one word in it is one of words."""
    return [_column(column, [row[i] for row in table.rows]) for i, column in enumerate(table.columns)]


def _column(column: Column, cells: Sequence[Cell]) -> ShownColumn:
    """A column as text: one number of digits for all of its numbers, and which is best."""
    pairs = [cell if isinstance(cell, tuple) else (cell, None) for cell in cells]
    if any(isinstance(first, str) for first, _ in pairs):
        words = tuple(Shown("–" if first is None else str(first)) for first, _ in pairs)
        return ShownColumn(column.name, "", False, words)
    numbers = [None if isinstance(first, str) else first for first, _ in pairs]
    style = Format.of(numbers, column.percent)
    known = [n for n in numbers if n is not None and n == n]
    best = {"max": max, "min": min}[column.best](known) if column.best and known else None
    spreads = ["" if s is None or s != s else style.show(s) for _, s in pairs]
    shown = (Shown(style.show(n), s, best is not None and n == best) for n, s in zip(numbers, spreads, strict=True))
    return ShownColumn(column.name, style.unit, True, tuple(shown))
