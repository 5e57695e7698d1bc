"""Plan: a recipe resolved on a model, before anything is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.errors import PlanError
from smidgen.heads import check_pooling, head_names, own_pooling, unused_under
from smidgen.inputs import find_input
from smidgen.method import Method
from smidgen.pools import with_pools
from smidgen.recipe import Recipe, Term, as_recipe
from smidgen.rows import SHARED, Row, Shape, safetensors_size
from smidgen.sites import Site, find_sites
from smidgen.sublayers import find_heads, find_sublayers
from smidgen.unfit import no_match, refuse_no_room, refuse_part, refuse_twice, refuse_unfoldable, refuse_unsupported


@dataclass(frozen=True)
class Plan:
    """What a recipe will do to a model. The head is counted apart, the same in every recipe."""

    recipe: Recipe
    model: str
    rows: tuple[Row, ...]
    head: tuple[tuple[str, Shape], ...]
    pretrained: int
    pooling: str | None
    reads: str | None
    costs: dict[str, Any] | None = field(default=None, compare=False)
    chosen: bool = False

    @property
    def pending(self) -> bool:
        """Whether the recipe narrows and the values are not chosen yet: counts are those of the candidates."""
        return bool(self.recipe.narrowed) and not self.chosen

    @property
    def trained(self) -> int:
        """Trained values, head apart."""
        return sum(row.values for row in self.rows)

    @property
    def head_values(self) -> int:
        """Values of the head."""
        return sum(prod(shape) for _, shape in self.head)

    @property
    def share(self) -> float:
        """Trained values over pretrained values, head apart."""
        return self.trained / self.pretrained

    @property
    def shapes(self) -> dict[str, Shape]:
        """Saved name -> shape of all trained tensors, head included."""
        return {name: shape for row in self.rows for name, shape in row.names()} | dict(self.head)

    @property
    def saved(self) -> dict[str, Shape]:
        """Saved name -> shape of everything in the delta's file: `shapes`, with the indices of subsets."""
        return {name: shape for row in self.rows for name, shape in row.saved()} | dict(self.head)

    @property
    def file_bytes(self) -> int:
        """Size of the safetensors file in bytes, exactly."""
        return safetensors_size(self.saved)

    @property
    def lowest(self) -> str:
        """The lowest edited place: nothing below it needs a gradient."""
        if not self.rows:
            return "head"
        placed = [row.site for row in self.rows if row.site.kind != SHARED]
        if any(site.layer is None and "final" not in site.roles for site in placed):
            return "embeddings"
        layers = [(site.stack, site.layer) for site in placed if site.layer is not None]
        if not layers:
            return "final norm"
        lowest: dict[str, int] = {}
        for stack, layer in layers:
            lowest[stack] = min(layer, lowest.get(stack, layer))
        return ", ".join(f"{stack}.{layer}" for stack, layer in lowest.items())

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "recipe": str(self.recipe),
            "model": self.model,
            "trained": self.trained,
            "head": self.head_values,
            "pretrained": self.pretrained,
            "share": self.share,
            "file_bytes": self.file_bytes,
            "lowest": self.lowest,
            "pooling": self.pooling or self.reads,
            "costs": self.costs,
            "narrowed": "later" if self.pending else self.chosen,
            "tensors": {name: list(shape) for name, shape in self.saved.items()},
        }

    def __str__(self) -> str:
        lines = [f"{self.recipe} on {self.model}"]
        lines += [f"  {name:<60} {list(shape)}" for row in self.rows for name, shape in row.names()]
        lines.append(
            f"trains {self.trained:,} of {self.pretrained:,} values ({self.share:.4%}); "
            f"head apart {self.head_values:,}; file {self.file_bytes:,} bytes; lowest edit: {self.lowest}"
        )
        return "\n".join(lines)


def resolve(model: nn.Module, recipe: str | Term | Recipe, pooling: str | None = None) -> Plan:
    """Resolve a recipe on a model, which may live on the meta device and is not touched.

    Raises:
        PlanError: a method matches nothing, two methods train the same tensor, the base is quantised, or layers
            are named on a model that shares them.
    """
    recipe = as_recipe(recipe)
    refuse_unsupported(model, recipe)
    pooling = check_pooling(model, pooling)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    idle = set(unused_under(model, pooling))
    head = [name for name in head_names(model) if name not in idle]
    closed = {id(parameters[name]) for name in (*head, *idle)}
    sites = [*find_sites(model), *find_sublayers(model)]
    sites += [*find_heads(model, sites), *find_input(model)]
    rows: list[Row] = []
    for index, method in enumerate(recipe):
        if not isinstance(method, Method):
            raise PlanError(f"{method} is not a method")
        refuse_part(recipe, index, method)
        method.check(sites)
        found = list(_rows(index, method, sites, parameters, closed))
        if not found and _wants_sites(method):
            raise PlanError(no_match(method, model, sites))
        rows += with_pools(found) if method.overrides("shared") else found
    refuse_no_room(model, rows)
    refuse_twice(rows, parameters)
    refuse_unfoldable(rows)
    outside = {id(parameters[name]) for name in head_names(model)}
    pretrained = sum(p.numel() for n, p in model.named_parameters() if id(p) not in outside)
    shapes = tuple((name, tuple(parameters[name].shape)) for name in head)
    return Plan(recipe, type(model).__name__, tuple(rows), shapes, pretrained, pooling, own_pooling(model))


def _wants_sites(method: Method) -> bool:
    return method.overrides("trains") or method.overrides("acts")


def _rows(
    index: int, method: Method, sites: list[Site], parameters: dict[str, nn.Parameter], closed: set[int]
) -> Iterator[Row]:
    seen: set[int] = set()
    for site in sites:
        prefix = f"{site.path}." if site.path else ""
        owned = {term: parameters[prefix + term] for term, _ in site.terms}
        trained = [term for term in method.trains(site) if id(owned[term]) not in closed | seen]
        seen.update(id(owned[term]) for term in trained)
        if trained:
            yield Row(index, method, site, tuple((t, tuple(owned[t].shape)) for t in trained), added=False)
        in_head = any(id(p) in closed for p in owned.values())
        if not in_head and method.acts(site):
            with torch.device("meta"):
                tensors = method.init(site)
                saved = method.settle(tensors, site) if method.settled() != method else {}
            yield Row(index, method, site, _shapes(tensors), True, settled=_shapes(saved))


def _shapes(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, Shape], ...]:
    return tuple((symbol, tuple(tensor.shape)) for symbol, tensor in tensors.items())
