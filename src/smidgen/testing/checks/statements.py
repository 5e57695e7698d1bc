"""Checks of what is said: counts, files, spelling, docstrings."""

from __future__ import annotations

import re
import tempfile
from dataclasses import fields as fields_of
from math import prod

from smidgen.delta.attaching import attach, detach
from smidgen.delta.delta import TENSORS, Delta
from smidgen.methods.base import Method
from smidgen.planning.entry import Entry
from smidgen.planning.resolution import resolve
from smidgen.planning.selection.narrowing import settle
from smidgen.ports.attachment_record import trained_parameters
from smidgen.recipe.recipe import Recipe, parse
from smidgen.sites.site import Site
from smidgen.testing.cases import Case, check
from smidgen.testing.checks.common import equal


@check
def counts_as_planned(case: Case) -> None:
    """The plan's counts are those of the tensors, and its file size is the file's."""
    plan = settle(case.model, resolve(case.model, case.recipe), case.seed)
    case.attach()
    delta = Delta.of(case.model)
    head = {name for name, _ in plan.head}
    found = sum(p.numel() for name, p in trained_parameters(case.model).items() if name not in head)
    assert plan.trained == found, f"planned {plan.trained} values, trains {found}"
    shapes = {name: tuple(t.shape) for name, t in delta.tensors.items()}
    assert dict(plan.saved) == shapes, "planned names or shapes differ from the delta's"
    small = {name: t.float() if t.is_floating_point() else t for name, t in delta.tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Delta(delta.recipe, small, delta.base, delta.head).save(folder)
        size = (path / TENSORS).stat().st_size
    assert size == plan.file_bytes, f"planned {plan.file_bytes} bytes, file has {size}"


@check
def delta_round_trips(case: Case) -> None:
    """Saved, loaded and attached again, the delta has the same bits and does the same."""
    case.attach(perturb=0.3)
    trained, delta = case.run(), detach(case.model)
    with tempfile.TemporaryDirectory() as folder:
        loaded = Delta.load(delta.save(folder))
    assert loaded.recipe == delta.recipe and loaded.to_json() == delta.to_json(), "the saved description differs"
    for name, tensor in delta.tensors.items():
        equal(loaded.tensors[name], tensor, name)
    attach(case.model, loaded)
    equal(case.run(), trained, "output after loading")


@check
def spelling_round_trips(case: Case) -> None:
    """Spelling and JSON come back as the same recipe."""
    assert parse(str(case.recipe)) == case.recipe, f"{case.recipe} is read as {parse(str(case.recipe))}"
    assert Recipe.from_json(case.recipe.to_json()) == case.recipe, "the saved form gives another recipe"


@check
def docstring_is_true(case: Case) -> None:
    """Paper with number and section, formula, and shapes that agree with `init`."""
    for term in case.recipe:
        text = type(term).__doc__ or ""
        assert re.search(r"arXiv:\d{4}\.\d{4,5}", text), f"{type(term).__name__} names no arXiv number"
        assert re.search(r"section|equation|sec\.|eq\.", text), f"{type(term).__name__} names no section"
        assert "Shapes:" in text and "Departures:" in text, f"{type(term).__name__} lacks Shapes or Departures"
        first = text.strip().splitlines()[0]
        assert len(first) <= 90 and first.endswith("."), f"{type(term).__name__}: the first line is not one sentence"
    for entry in resolve(case.model, case.recipe).entries:
        if entry.added:
            _check_shapes(entry)


def _check_shapes(entry: Entry) -> None:
    """Each saved tensor has a shape that the docstring states."""
    method: Method[Site] = entry.method
    fields = {name: getattr(method, name) for name in method.__dataclass_fields__}
    site = entry.sites[0] if entry.owns_shared else entry.site  # what shares tensors is alike
    names = fields | {f.name: value for f in fields_of(site) if isinstance(value := getattr(site, f.name), int)}
    if entry.owns_shared:
        names["sites"] = len(entry.sites)
    for symbol, shape in entry.terms:
        line = re.search(rf"^\s+{symbol}: (.*)$", method.__doc__ or "", re.MULTILINE)
        assert line, f"{type(method).__name__} does not give the shape of {symbol}"
        stated = [_numbers(match, names) for match in re.findall(r"\(([^)]*)\)", line.group(1))]
        assert shape in stated, f"{type(method).__name__}: {symbol} is {shape}, the docstring says {stated}"


def _numbers(text: str, names: dict[str, int]) -> tuple[int, ...]:
    """(rank*2, width_in/blocks) as numbers; -1 for a name that is none."""

    def number(word: str) -> int:
        return int(word) if word.strip().isdigit() else names.get(word.strip(), -1)

    found = []
    for word in filter(str.strip, text.split(",")):
        over, *under = word.split("/")
        found.append(prod(map(number, over.split("*"))) // prod(map(number, under)))
    return tuple(found)
