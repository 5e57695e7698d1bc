"""What a diagnosis looks like in a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from smidgen.cli.views.results import facts, table

if TYPE_CHECKING:
    from smidgen.sites.inventory import Part
    from smidgen.studies.diagnosis import Diagnosis, Finding, Place


def diagnosis_view(result: Diagnosis, detailed: bool) -> RenderableType:
    """What the model is made of, then what was found; `detailed`: by place, for one recipe."""
    title = Text(f"{result.model}: {result.values:,} values", style="bold")
    made = {"head": ", ".join(result.head[:4]) + (", ..." if len(result.head) > 4 else "") or "none"}
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in result.inputs.items())
    made["run on"] = shapes or f"nothing: {result.unrun}"
    left = [(reason, len(paths), paths[0]) for reason, paths in result.left.items()]
    bodies: list[RenderableType] = [title, _parts("site", result.sites), _parts("norm", result.norms)]
    bodies += [_parts("buffer of", result.buffers)] if result.buffers else []
    bodies += [table(("left alone", "#modules", "first"), left)] if left else []
    bodies += [facts(made), table(("recipe", "#values", "places", "acts", "merges"), map(_line, result.findings))]
    if detailed:
        bodies += [table(("method", "place", "#places", "#values", "acts"), _places(result.findings[0].places))]
    bodies += [Text(fault, style="red") for fault in result.faults] or [Text("nothing wrong was found")]
    return Group(*bodies)


def _parts(name: str, parts: Sequence[Part]) -> RenderableType:
    rows = [(part.what, part.about, part.count, part.values, part.first) for part in parts]
    return table((name, "what it is", "#count", "#values", "first"), rows)


def _line(finding: Finding) -> tuple[object, ...]:
    places = finding.places
    if finding.refused or finding.crashed:
        return finding.recipe, "-", "-", f"no: {finding.refused or finding.crashed}", "-"
    acting = sum(place.acts == "yes" for place in places)
    acts = "not run" if finding.changes is None else f"{acting} of {len(places)}"
    values = sum(place.values for place in places if place.method != "head")
    return finding.recipe, values, str(len(places)), acts, _merges(finding)


def _merges(finding: Finding) -> str:
    if finding.merged is None:
        return f"no: {finding.kept}" if finding.kept else "not run"
    return f"{'yes' if finding.merges else 'NO'}, differs by {finding.merged:.1g} of {finding.changes:.2g}"


def _places(places: Sequence[Place]) -> Iterator[tuple[object, ...]]:
    """Places that differ in the layer alone, together."""
    groups: dict[tuple[str, str, str], list[Place]] = {}
    for place in places:
        path = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", place.name)
        groups.setdefault((place.method, path, place.acts), []).append(place)
    for (method, path, acts), members in groups.items():
        yield method, path, len(members), sum(member.values for member in members), acts or "not run"
