"""Sections as pictures: inline SVG that takes its colours from the page, and PNG for a paper."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

from smidgen.studies.reports.errors import ReportError
from smidgen.studies.reports.number_format import power, times
from smidgen.studies.reports.sections import Bars, HeatMap, Intervals, Lines, Number, Points, Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Drawn colour -> (on paper, variable of the page). The drawn ones occur nowhere else, so the SVG's can be replaced.
INK, MUTED, GRID, BACK = "#010203", "#010204", "#010205", "#010206"
PAPER = {INK: "#1b1f24", MUTED: "#59636e", GRID: "#d8dee4", BACK: "#ffffff"}
PAGE = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", BACK: "var(--page)"}
SERIES = tuple(f"#01030{i}" for i in range(6))
GROUPS = (SERIES[0], SERIES[5], *SERIES[1:5])  # the first group is the one to look at, the second the rest
PAPER |= dict(zip(SERIES, ("#3b6fb6", "#c8553d", "#2e8b6f", "#8a5fb0", "#b8860b", "#5b6570"), strict=True))
PAGE |= {colour: f"var(--s{i})" for i, colour in enumerate(SERIES)}
DRAWN = {colour: colour for colour in PAGE}
WIDTH, DPI = 7.6, 160
CLOSE = 0.06  # of a chart's height: names of points that are nearer would overlap
Paint = Mapping[str, str]
STYLE: dict[str, object] = {
    "svg.fonttype": "path", "svg.hashsalt": "smidgen", "font.family": "DejaVu Sans", "font.size": 9,
    "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": GRID, "xtick.color": MUTED, "ytick.color": INK,
    "xtick.labelsize": 8.5, "axes.labelsize": 8.5, "legend.fontsize": 8.5, "grid.color": GRID, "grid.linewidth": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.facecolor": "none",
    "figure.facecolor": "none", "legend.frameon": False, "axes.unicode_minus": True,
}  # fmt: skip


def svg(section: Section, prefix: str = "chart") -> str:
    """A chart as an SVG element for a page that defines the colours; its ids begin with the prefix."""
    buffer = io.StringIO()
    with _styled(DRAWN):
        _figure(section, DRAWN).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    for colour, name in PAGE.items():
        text = text.replace(colour, name)
    text = re.sub(r'((?:id="|href="#|url\(#))', rf"\g<1>{prefix}-", text)
    return re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true">', text, count=1)


def png(section: Section) -> bytes:
    """A chart on white, 160 dots per inch."""
    buffer = io.BytesIO()
    with _styled(PAPER):
        figure = _figure(section, PAPER)
        figure.savefig(buffer, format="png", dpi=DPI, facecolor=PAPER[BACK], metadata={"Software": None})
    return buffer.getvalue()


def colour(share: float) -> tuple[str, str]:
    """(background, readable ink) of a cell at a share from 0 to 1 of the colour scale."""
    red, green, blue, _ = (float(x) for x in _matplotlib().colormaps["cividis"](share))
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (red, green, blue)]
    light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    ink = "#ffffff" if 1.05 / (light + 0.05) > (light + 0.05) / 0.05 else "#000000"
    return "#" + "".join(f"{round(255 * x):02x}" for x in (red, green, blue)), ink


def share_chart(values: Sequence[Sequence[Number]], log: bool) -> list[list[float | None]]:
    """The place of each number on the colour scale, 0 for the smallest to 1 for the largest; None if missing."""
    place = [[_place(v, log) for v in row] for row in values]
    known = [p for row in place for p in row if p is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    width = (high - low) or 1.0
    return [[None if p is None else (p - low) / width for p in row] for row in place]


def _place(value: Number, log: bool) -> float | None:
    if value is None or not math.isfinite(value) or (log and value <= 0):
        return None
    return math.log10(value) if log else value


def _matplotlib() -> ModuleType:
    try:
        import matplotlib
    except ImportError:
        raise ReportError("a report needs matplotlib and jinja2: pip install 'smidgen[report]'") from None
    return matplotlib


@contextmanager
def _styled(paint: Paint) -> Iterator[None]:
    with _matplotlib().rc_context({key: paint.get(str(value), value) for key, value in STYLE.items()}):
        yield


def _figure(section: Section, paint: Paint) -> Figure:
    drawers: dict[type[Section], Callable[..., Figure]] = {
        Bars: _bars, Lines: _lines, HeatMap: _heat, Points: _points, Intervals: _intervals,
    }  # fmt: skip
    return drawers[type(section)](section, paint)


def _new(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _bars(section: Bars, paint: Paint) -> Figure:
    """Horizontal bars with their spreads, coloured by group."""
    figure, axes = _new(0.75 + 0.27 * len(section.labels))
    groups = list(dict.fromkeys(section.groups.values())) or [""]
    places = range(len(section.labels))
    scale = -2 if section.percent else power(section.values)
    values, spreads = _drawable(section.values, scale), _drawable(section.spreads, scale, missing=0.0)
    colours = [paint[GROUPS[groups.index(section.groups.get(label, groups[0])) % 6]] for label in section.labels]
    axes.barh(places, values, height=0.68, color=colours)
    if any(spreads):
        axes.errorbar(
            values, places, xerr=spreads, fmt="none", ecolor=paint[INK], elinewidth=1, capsize=2.5, capthick=1
        )
    axes.set_yticks(places, section.labels)
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.set_xlabel(" ".join(filter(None, (section.unit, "in %" if section.percent else times(scale)))))
    axes.tick_params(length=0)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)
    _legend(axes, groups, paint)
    return figure


def _legend(axes: Axes, groups: Sequence[str], paint: Paint) -> None:
    """What the colours of several groups are."""
    if len(groups) > 1:
        from matplotlib.patches import Patch

        axes.legend(handles=[Patch(color=paint[GROUPS[i % 6]], label=name) for i, name in enumerate(groups)])


def _intervals(section: Intervals, paint: Paint) -> Figure:
    """A forest plot: one line for each label."""
    figure, axes = _new(0.9 + 0.27 * len(section.intervals))
    groups = list(dict.fromkeys(section.groups.values())) or [""]
    if section.margin:
        axes.axvspan(-section.margin, section.margin, color=paint[MUTED], alpha=0.15, linewidth=0)
    axes.axvline(0.0, color=paint[MUTED], linewidth=1)
    for place, (label, (mean, low, high)) in enumerate(section.intervals.items()):
        shade = paint[GROUPS[groups.index(section.groups.get(label, groups[0])) % 6]]
        around = None if low is None or high is None else [[max(0.0, mean - low)], [max(0.0, high - mean)]]
        axes.errorbar(mean, place, xerr=around, fmt="o", color=shade, markersize=5, elinewidth=1.4, capsize=2.5)
    axes.set_yticks(range(len(section.intervals)), list(section.intervals))
    axes.invert_yaxis()
    axes.margins(y=0.06)
    axes.set_xlabel(section.unit)
    axes.tick_params(length=0)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)
    _legend(axes, groups, paint)
    return figure


def _lines(section: Lines, paint: Paint) -> Figure:
    """One line a series over x, with a band of one spread on either side."""
    figure, axes = _new(3.4)
    scale = 0 if section.log else power([v for values, _ in section.series.values() for v in values])
    for i, (name, (given, spreads)) in enumerate(section.series.items()):
        shade, dashes = paint[SERIES[i % 6]], ("-", "--", ":")[i // 6 % 3]
        values, around = _drawable(given, scale), _drawable(spreads, scale, missing=0.0)
        places = [(x, v) for x, v in zip(section.x, values, strict=True) if not (section.log_x and math.isnan(v))]
        x, y = [x for x, _ in places], [v for _, v in places]
        axes.plot(x, y, dashes, color=shade, marker="o", markersize=3.5, linewidth=1.6, label=name)
        if any(around):
            low = [v - s for v, s in zip(values, around, strict=True)]
            high = [v + s for v, s in zip(values, around, strict=True)]
            axes.fill_between(section.x, low, high, color=shade, alpha=0.15, linewidth=0)
    if section.log:
        axes.set_yscale("log")
    if section.log_x:
        axes.set_xscale("log")
    elif all(float(x).is_integer() for x in section.x) and len(section.x) <= 32:
        axes.set_xticks(list(section.x))
    axes.set_xlabel(section.across)
    axes.set_ylabel(f"{section.unit} {times(scale)}".strip())
    axes.tick_params(length=0, axis="both", labelcolor=paint[MUTED])
    axes.grid()
    figure.legend(loc="outside right upper")
    return figure


def _points(section: Points, paint: Paint) -> Figure:
    """Points with their names and spreads, and the front as a line of steps."""
    figure, axes = _new(3.8)
    costs = [x for x, _, _ in section.points.values() if x > 0]
    least = min(costs, default=1.0) / 3

    def place(x: float) -> float:
        return max(x, least) if section.log_x else x

    heights = [y for _, y, _ in section.points.values()]
    span = max(heights, default=0.0) - min(heights, default=0.0)
    front = [section.points[name] for name in section.front]
    axes.step([place(x) for x, _, _ in front], [y for _, y, _ in front], where="post", color=paint[MUTED], linewidth=1)
    for i, (name, (x, y, spread)) in enumerate(section.points.items()):
        shade = paint[SERIES[i % 6]]
        axes.errorbar(place(x), y, yerr=spread, fmt="o", color=shade, markersize=5, elinewidth=1, capsize=2.5)
        below = any(place(x) == place(u) and 0 < v - y < CLOSE * span for u, v, _ in section.points.values())
        axes.annotate(
            name, (place(x), y), (6, -11 if below else 4), textcoords="offset points", fontsize=8, color=paint[INK]
        )
    if section.log_x:
        axes.set_xscale("log")
    axes.margins(x=0.12, y=0.15)
    axes.set_xlabel(section.across)
    axes.set_ylabel(section.unit)
    axes.tick_params(length=0, axis="both", labelcolor=paint[MUTED])
    axes.grid()
    return figure


def _drawable(values: Sequence[Number], scale: int, missing: float = math.nan) -> list[float]:
    return [missing if v is None or not math.isfinite(v) else v / 10.0**scale for v in values]


def _heat(section: HeatMap, paint: Paint) -> Figure:
    """A grid of colours with its scale; what has no value stays blank."""
    from matplotlib.colors import LogNorm, Normalize

    figure, axes = _new(0.9 + 0.3 * len(section.rows))
    values = [[math.nan if v is None or _place(v, section.log) is None else v for v in row] for row in section.values]
    known = [v for row in values for v in row if math.isfinite(v)] or [0.0, 1.0]
    norm = (LogNorm if section.log else Normalize)(min(known), max(known))
    image = axes.imshow(values, cmap="cividis", norm=norm, aspect="auto", interpolation="nearest")
    heads = [f"{group} {column}".strip() for group, column in zip(section.groups, section.columns, strict=False)]
    upright = 90 if heads and max(map(len, heads)) > 4 else 0
    axes.set_xticks(range(len(section.columns)), heads or section.columns, rotation=upright)
    axes.set_yticks(range(len(section.rows)), section.rows)
    axes.set_xlabel(section.across)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, label=section.unit)
    bar.outline.set_visible(False)
    return figure
