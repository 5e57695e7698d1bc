"""Report: sections -> one HTML file that needs nothing else, a picture per chart, and the numbers as JSON."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from itertools import groupby
from pathlib import Path

from smidgen.common.atomic_files import write_files
from smidgen.common.json_numbers import plain
from smidgen.studies.reports.charts import colour, png, share_chart, svg
from smidgen.studies.reports.column_layout import shown_columns
from smidgen.studies.reports.errors import ReportError
from smidgen.studies.reports.number_format import Format, brief
from smidgen.studies.reports.sections import Bars, HeatMap, Intervals, Lines, Points, Quotes, Section, Table

HTML, JSON, TEMPLATE = "report.html", "report.json", "report.html.jinja"
CONTENTS = 4  # sections that need no table of contents
PACKAGES = ("smidgen", "torch", "transformers")


@dataclass(frozen=True)
class Report:
    """A titled list of sections.

    Attributes:
        summary: paragraphs above everything: what was found.
        facts: name -> value, what it was found on.
        command: what made it, for the last line.
        data: the results themselves; they go into the JSON only.
    """

    title: str
    summary: Sequence[str]
    sections: Sequence[Section]
    facts: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    data: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Everything as plain data; numbers that are not finite are null."""
        return plain({
            "title": self.title,
            "summary": list(self.summary),
            "facts": dict(self.facts),
            "sections": [section.to_json() for section in self.sections],
            "command": self.command,
            "versions": versions(),
            "data": dict(self.data),
        })  # fmt: skip

    def html(self) -> str:
        """The page: styles and charts inside, nothing is loaded.

        Raises:
            ReportError: matplotlib or jinja2 is missing.
        """
        try:
            from jinja2 import Environment, StrictUndefined
        except ImportError:
            raise ReportError("a report needs matplotlib and jinja2: pip install 'smidgen[report]'") from None
        source = files("smidgen.studies.reports").joinpath(TEMPLATE).read_text(encoding="utf-8")
        page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        views = [_view(section, slug) for section, slug in zip(self.sections, self._slugs(), strict=True)]
        names = {"title": self.title, "summary": self.summary, "facts": self.facts, "command": self.command}
        made_by = ", ".join(f"{name} {number}" for name, number in versions().items())
        return page.from_string(source).render(
            **names, sections=views, contents=len(views) > CONTENTS, versions=made_by
        )

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write report.html, report.json and a PNG per chart; all of them appear, or none.

        Raises:
            DeltaError: the folder cannot be written, or the disk is full.
            ReportError: as in `html`.
        """
        data = {HTML: self.html().encode(), JSON: json.dumps(self.to_json(), indent=1, ensure_ascii=False).encode()}
        for section, slug in zip(self.sections, self._slugs(), strict=True):
            if isinstance(section, Bars | Lines | HeatMap | Intervals | Points):
                data[f"{slug}.png"] = png(section)
        return write_files(Path(folder), data)

    def _slugs(self) -> list[str]:
        """A name for each section that is fit for an anchor and a file, no two alike."""
        found: list[str] = []
        for section in self.sections:
            slug = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") or "section"
            found.append(slug if slug not in found else f"{slug}-{len(found)}")
        return found


def versions() -> dict[str, str]:
    """Name -> version of what made a report; no date, so that the same results give the same files."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "Python": platform.python_version()}


def _view(section: Section, slug: str) -> dict[str, object]:
    """What the template shows of a section: strings only."""
    view = {"kind": section.kind, "title": section.title, "slug": slug, "note": getattr(section, "note", "")}
    if isinstance(section, Table):
        return view | _table(section)
    if isinstance(section, HeatMap):
        return view | _heat_map(section)
    if isinstance(section, Quotes):
        return view | {"quotes": section.quotes}
    if isinstance(section, Bars | Intervals | Lines | Points):
        return view | {"svg": svg(section, slug), "said": _said(section)}
    return view | {"paragraphs": getattr(section, "paragraphs", ())}


def _table(section: Table) -> dict[str, object]:
    columns = shown_columns(section)
    return {"columns": columns, "rows": list(zip(*(column.cells for column in columns), strict=True))}


def _heat_map(section: HeatMap) -> dict[str, object]:
    """What the page template needs of a heat map: text and colour of each cell, and the scale."""
    known = [v for row in section.values for v in row]
    style, rows = Format.of(known, section.percent), []
    for name, values, places in zip(
        section.rows, section.values, share_chart(section.values, section.log), strict=True
    ):
        cells = [("", None) if s is None else (style.show(v), colour(s)) for v, s in zip(values, places, strict=True)]
        rows.append({"name": name, "cells": cells})
    finite = [v for v in known if v is not None and v == v]
    ends = [style.show(end(finite)) if finite else "" for end in (min, max)]
    unit = " ".join(filter(None, (section.unit, "in %" if section.percent else style.unit)))
    view = {
        "rows": rows,
        "columns": section.columns,
        "groups": _runs(section.groups),
        "across": section.across,
        "unit": unit,
        "ends": ends,
    }
    return view | {"ramp": ", ".join(colour(i / 8)[0] for i in range(9)), "log": section.log}


def _runs(words: Sequence[str]) -> list[tuple[str, int]]:
    """Each word with how often it stands in a row; nothing if all are empty."""
    return [(word, len(list(run))) for word, run in groupby(words)] if any(words) else []


def _said(section: Bars | Intervals | Lines | Points) -> str:
    """A chart in words, for those who cannot see it."""
    if isinstance(section, Points):
        return f"{section.title}: {', '.join(section.points)}; on the front {', '.join(section.front)}"
    if isinstance(section, Intervals):
        each = (f"{name} {brief(mean)}" for name, (mean, _, _) in section.intervals.items())
        return f"{section.title}: {', '.join(each)}"
    if isinstance(section, Lines):
        return f"{section.title}: {', '.join(section.series)} over {section.across}"
    pairs = zip(section.labels, section.values, strict=True)
    return f"{section.title}: " + ", ".join(f"{name} {'–' if v is None else brief(v)}" for name, v in pairs)
