"""What would reach a part of a model that a method leaves out: the names that `target=` takes for its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import cached_property

from smidgen.methods.base import Method
from smidgen.methods.capabilities import Merges
from smidgen.recipe.recipe import Term
from smidgen.sites.roles import within
from smidgen.sites.site import LinearSite, Site, WeightSite

NAMED = 4  # names that an advice gives at most


def without_numbers(path: str) -> str:
    """A module path with * for the numbers of layers."""
    return re.sub(r"(^|[._])\d+(?=\.|$)", r"\1*", path)


def widest_targeted() -> Method | None:
    """The registered method, at its defaults, that takes targets by name, folds into what it finds there, and does so
    at the most kinds of places; the first of several."""
    classes = (cls for cls in Term.registry.values() if issubclass(cls, Method))
    methods = (cls() for cls in classes if "target" in {field.name for field in fields(cls)})
    folding = [method for method in methods if isinstance(method, Merges)]
    return max(folding, key=lambda method: len(getattr(method, "beyond_maps", ())), default=None)


class Advice:
    """How a method may reach what it leaves out, by its own `target=` or else by another's."""

    def __init__(self, method: Method, sites: Sequence[Site]) -> None:
        other = widest_targeted()
        self.methods = (("", method), *([(f"{type(other).__name__} with ", other)] if other is not None else []))
        self.sites = [s for s in sites if isinstance(s, LinearSite | WeightSite) and s.rows is None]

    def for_module(self, path: str) -> str:
        """The advice for what lies in the module at a path; "" if neither acts there."""
        inside = [site for site in self.sites if within(site.path, path)]
        for who, method in self.methods:
            names = list(dict.fromkeys(self._reached(method, path, inside)))
            if len(names) > NAMED:
                return f"{who}target= acts there by the names of the weights, such as {names[0]!r}"
            if names:
                return f"{who}target={(names[0] if len(names) == 1 else tuple(names))!r} acts there"
        return ""

    def _reached(self, method: Method, path: str, inside: Sequence[Site]) -> Iterator[str]:
        """Names under which a method acts in a module; none if it takes no names of modules."""
        for site in inside if hasattr(method, "target") else ():
            name = self._name(_full(site), without_numbers(path))
            targets: dict[str, tuple[str, ...]] = {"target": (name,)}
            if replace(method, **targets).acts(site):
                yield name

    def _name(self, full: str, pattern: str) -> str:
        """The shortest end of a weight's path, of two names or more, that stands for none outside of the module."""
        words = full.split(".")
        ends = (".".join(words[-count:]) for count in range(2, len(words)))
        usable = (end for end in ends if not end[0].isdigit() and _names(end) > 1)
        alone = (end for end in usable if all(within(found, pattern) for found in self._owners[end]))
        return next(alone, full)

    @cached_property
    def _owners(self) -> dict[str, set[str]]:
        """End of a path -> what ends so, without numbers."""
        found: dict[str, set[str]] = {}
        for full in map(_full, self.sites):
            words = full.split(".")
            for count in range(1, len(words) + 1):
                found.setdefault(".".join(words[-count:]), set()).add(without_numbers(full))
        return found


def _full(site: Site) -> str:
    """A map by its path; a weight by its module and its own name: "mlp.experts.gate_up_proj"."""
    return f"{site.path}.{site.term}" if isinstance(site, WeightSite) else site.path


def _names(path: str) -> int:
    return sum(not word.isdigit() for word in path.split("."))
