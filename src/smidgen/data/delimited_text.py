"""Delimited text (.csv, .tsv): separator and quoting are what gives every row as many fields as the header."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import Literal

from datasets import Dataset, Features, Value

from smidgen.common.errors import DataError

SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}
_WHOLE = re.compile(r"-?(?:0|[1-9]\d{0,17})").fullmatch  # "007" is a name, not a 7
_DIGITS = r"(?:0|[1-9]\d*)"
_NUMBER = re.compile(
    rf"[+-]?(?:{_DIGITS}\.\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?|{_DIGITS}e[+-]?\d+|inf|nan)", re.I
).fullmatch


@dataclass(frozen=True)
class DelimitedTable:
    """Cells of a delimited file.

    Attributes:
        columns: name -> cells as they stand, None for an empty one.
        note: what was found that a .csv, or a .tsv, does not promise.
    """

    columns: dict[str, list[str | None]]
    note: str = ""


@dataclass(frozen=True)
class _Form:
    """A way to read delimited text: the options of csv.reader, and what is to be said of them."""

    separator: str
    note: str
    skips_spaces: bool = False
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL

    def records(self, text: str) -> Iterator[tuple[int, list[str]]]:
        """(number of the first line, fields) of each record that is not blank. Raises csv.Error."""
        lines = StringIO(text, newline="")
        reader = csv.reader(
            lines, delimiter=self.separator, strict=True, skipinitialspace=self.skips_spaces, quoting=self.quoting
        )
        line = 1
        try:
            for fields in reader:
                if len(fields) > 1 or any(map(str.strip, fields)):
                    yield line, fields
                line = reader.line_num + 1
        except csv.Error as error:
            reason = "a quote is opened and not closed" if "end of data" in str(error) else str(error)
            raise csv.Error(f"line {line}: {reason}; a quote within a quoted text is written twice") from None


def parse_delimited(text: str, name: str, expected: str) -> DelimitedTable:
    """The cells of delimited text whose first line names the columns.

    The separator is the expected one, else another that the header has, with which every row has as many fields as
    the header. Quotes between tabs are part of the texts where rows are not whole otherwise.

    Raises:
        DataError: no reading gives rows of one length; the message names the first line that differs. Or the header
            names a column twice.
    """
    header = next((line for line in text.splitlines() if line.strip()), "")
    faults = []
    with _long_fields(text):
        for form in _forms(header, expected):
            try:
                return _table(form, text, name)
            except csv.Error as error:
                faults.append(f"{name} {error}")
    raise DataError(faults[0])


def _forms(header: str, expected: str) -> Iterator[_Form]:
    """What to try, the likeliest first."""
    there = [sep for sep in (expected, *SEPARATORS) if sep in header] or [expected]
    for sep in dict.fromkeys(sorted(there, key=lambda sep: (sep != expected, -header.count(sep)))):
        said = [] if sep == expected else [f"parts its columns by {SEPARATORS[sep]}"]
        yield _Form(sep, "".join(said))
        yield _Form(sep, "".join(said), skips_spaces=True)
        if sep == "\t":  # where texts need no quotes, and often have unpaired ones of their own, as in GLUE
            note = " and ".join([*said, "has quotes that are part of its texts"])
            yield _Form(sep, note, quoting=csv.QUOTE_NONE)


def _table(form: _Form, text: str, name: str) -> DelimitedTable:
    records = form.records(text)
    names = _header(next(records)[1], name)
    columns: list[list[str | None]] = [[] for _ in names]
    for line, fields in records:
        if len(fields) != len(names):
            raise csv.Error(_uneven(line, fields, names, form))
        for column, cell in zip(columns, fields, strict=True):
            column.append(cell or None)
    return DelimitedTable(dict(zip(names, columns, strict=True)), form.note)


def _header(fields: Sequence[str], name: str) -> list[str]:
    names = [field.strip() or f"unnamed_{i}" for i, field in enumerate(fields)]
    twice = next((each for i, each in enumerate(names) if each in names[:i]), None)
    if twice is not None:
        raise DataError(f"{name} names the column {twice!r} twice in its header; rename one of the two")
    return names


def _uneven(line: int, fields: Sequence[str], names: Sequence[str], form: _Form) -> str:
    shown = " | ".join(field if len(field) <= 30 else f"{field[:27]}..." for field in fields[:6])
    more = " | ..." if len(fields) > 6 else ""
    advice = f"a text that holds {SEPARATORS[form.separator]} or a line break needs quotes around it"
    count = f"{len(fields)} field{'s' * (len(fields) != 1)}"
    return f"line {line} has {count}, the header {len(names)} ({', '.join(names)}): {shown}{more}; {advice}"


@contextmanager
def _long_fields(text: str) -> Iterator[None]:
    """csv's own limit of 128 KiB a field is below some articles; it is a setting of the whole process."""
    before = csv.field_size_limit(len(text) + 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def joined(tables: Sequence[DelimitedTable], names: Sequence[str]) -> DelimitedTable:
    """The shards of one table, in order. Raises DataError if their headers differ."""
    first = tables[0]
    for table, name in zip(tables, names, strict=True):
        if list(table.columns) != list(first.columns):
            raise DataError(f"{name} has the columns {', '.join(table.columns)}, {names[0]} {', '.join(first.columns)}")
    cells = {name: [cell for table in tables for cell in table.columns[name]] for name in first.columns}
    return DelimitedTable(cells, first.note)


def typed(tables: Mapping[str, DelimitedTable]) -> dict[str, Dataset]:
    """Splits as rows. A column is whole numbers, numbers or text; the cells of all splits decide together."""
    names = dict.fromkeys(name for table in tables.values() for name in table.columns)
    kinds = {
        n: _kind(cell for t in tables.values() for cell in t.columns.get(n, ()) if cell is not None) for n in names
    }
    rows = {}
    for split, table in tables.items():
        features = Features({name: Value(kinds[name]) for name in table.columns})
        cells = {name: _converted(column, kinds[name]) for name, column in table.columns.items()}
        rows[split] = Dataset.from_dict(cells, features=features)
    return rows


def _kind(cells: Iterable[str]) -> str:
    kind = "null"
    for cell in map(str.strip, cells):
        if _WHOLE(cell):
            kind = "int64" if kind == "null" else kind
        elif _NUMBER(cell):
            kind = "float64"
        else:
            return "string"
    return kind


def _converted(cells: list[str | None], kind: str) -> Sequence[str | float | None]:
    make = {"int64": int, "float64": float}.get(kind)
    return cells if make is None else [None if cell is None else make(cell) for cell in cells]
