"""What a report is made of: text, tables, heat maps, bars and lines, as plain data with their own checks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar

from smidgen.studies.reports.errors import ReportError

Number = float | None
Cell = str | Number | tuple[Number, Number]  # a tuple is a mean with its spread


def mean_cell(values: Sequence[float]) -> Cell:
    """Mean with standard deviation; one value alone; None for none."""
    if len(values) < 2:
        return values[0] if values else None
    return statistics.fmean(values), statistics.stdev(values)


@dataclass(frozen=True)
class Section:
    """One titled part of a report; `note` is small print below it."""

    kind: ClassVar[str] = ""
    title: str

    def to_json(self) -> dict[str, object]:
        """Plain data with the kind."""
        return {"kind": self.kind, **asdict(self)}

    def check(self, good: bool, what: str) -> None:
        """Raise ReportError, naming this section, unless `good`."""
        if not good:
            raise ReportError(f"the {self.kind} {self.title!r} does not fit together: {what}")


@dataclass(frozen=True)
class Text(Section):
    """Paragraphs."""

    kind: ClassVar[str] = "text"
    paragraphs: Sequence[str] = ()
    note: str = ""


@dataclass(frozen=True)
class Quotes(Section):
    """Texts word for word, with their breaks, each under a name."""

    kind: ClassVar[str] = "quotes"
    quotes: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        best: "max" or "min" marks that number of the column.
        percent: numbers are shown times 100, with the sign.
    """

    name: str
    best: str | None = None
    percent: bool = False


@dataclass(frozen=True)
class Table(Section):
    """Rows of words and numbers; None and nan are missing."""

    kind: ClassVar[str] = "table"
    columns: Sequence[Column] = ()
    rows: Sequence[Sequence[Cell]] = ()
    note: str = ""

    def __post_init__(self) -> None:
        wrong = [len(row) for row in self.rows if len(row) != len(self.columns)]
        self.check(not wrong, f"{len(self.columns)} columns, but a row of {wrong[:1]}")


@dataclass(frozen=True)
class HeatMap(Section):
    """Numbers by row and column, coloured.

    Attributes:
        values: rows of numbers; None and nan are missing and stay blank.
        log: colours follow the logarithm, for numbers that span powers of ten; those not above 0 stay blank then.
        groups: a word for each column, such as "encoder"; neighbours with the same word share a head.
    """

    kind: ClassVar[str] = "heat map"
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    values: Sequence[Sequence[Number]] = ()
    unit: str = ""
    across: str = ""
    log: bool = False
    percent: bool = False
    groups: Sequence[str] = ()
    note: str = ""

    def __post_init__(self) -> None:
        self.check(
            len(self.groups) in (0, len(self.columns)), f"{len(self.columns)} columns, {len(self.groups)} groups"
        )
        self.check(len(self.values) == len(self.rows), f"{len(self.rows)} rows, {len(self.values)} given")
        wrong = [len(row) for row in self.values if len(row) != len(self.columns)]
        self.check(not wrong, f"{len(self.columns)} columns, but a row of {wrong[:1]}")


@dataclass(frozen=True)
class Bars(Section):
    """One horizontal bar per label, with its spread.

    Attributes:
        groups: label -> group; a group has a colour, in the order in which they are first named, and a legend.
        percent: numbers are shown times 100.
    """

    kind: ClassVar[str] = "bars"
    labels: Sequence[str] = ()
    values: Sequence[Number] = ()
    spreads: Sequence[Number] = ()
    unit: str = ""
    percent: bool = False
    groups: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        self.check(len(self.values) == len(self.labels), f"{len(self.labels)} labels, {len(self.values)} values")
        spreads = len(self.spreads) in (0, len(self.labels))
        self.check(spreads, f"{len(self.labels)} labels, {len(self.spreads)} spreads")


@dataclass(frozen=True)
class Lines(Section):
    """Series over one axis, each with a band of its spread.

    Attributes:
        series: name -> (values, spreads); spreads may be empty.
        log, log_x: the values, and the axis, by powers of ten. With `log_x` a line goes on over what is missing.
    """

    kind: ClassVar[str] = "lines"
    x: Sequence[float] = ()
    series: Mapping[str, tuple[Sequence[Number], Sequence[Number]]] = field(default_factory=dict)
    across: str = ""
    unit: str = ""
    log: bool = False
    log_x: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        for name, (values, spreads) in self.series.items():
            fits = len(values) == len(self.x) and len(spreads) in (0, len(self.x))
            self.check(fits, f"{name!r} has {len(values)} values and {len(spreads)} spreads for {len(self.x)} places")


@dataclass(frozen=True)
class Points(Section):
    """A named point for each (cost, value), and the front of those that none beats in both: less cost, more value.

    Attributes:
        points: name -> (cost, value, spread of the value or None).
        log_x: cost by powers of ten; those not above 0 stand at the left edge.
        more_is_better: of the value.
    """

    kind: ClassVar[str] = "points"
    points: Mapping[str, tuple[float, float, Number]] = field(default_factory=dict)
    across: str = ""
    unit: str = ""
    log_x: bool = False
    more_is_better: bool = True
    note: str = ""

    @property
    def front(self) -> list[str]:
        """Names of the points on the front, by cost."""
        sign, found, best = (1 if self.more_is_better else -1), list[str](), float("-inf")
        for name, (_, value, _) in sorted(self.points.items(), key=lambda entry: (entry[1][0], -sign * entry[1][1])):
            if sign * value > best:
                found.append(name)
                best = sign * value
        return found


@dataclass(frozen=True)
class Intervals(Section):
    """A mean with its interval for each label, over a line at zero and a band that counts as zero.

    Attributes:
        intervals: label -> (mean, low, high); low and high None where there is no interval.
        groups: label -> group; a group has a colour and a legend.
        margin: half the band's width, in the unit of the means.
    """

    kind: ClassVar[str] = "intervals"
    intervals: Mapping[str, tuple[float, Number, Number]] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    margin: float = 0.0
    unit: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        wrong = [name for name, (_, low, high) in self.intervals.items() if (low is None) != (high is None)]
        self.check(not wrong, f"{wrong[:1]} has one end of an interval")
