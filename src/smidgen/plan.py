"""Plan: a recipe resolved on a model, before anything is touched."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.bare import bare
from smidgen.calls import without_gradient
from smidgen.errors import PlanError
from smidgen.gaps import Gap, left_out
from smidgen.heads import check_pooling, head_parts, own_pooling, unused_under
from smidgen.inputs import find_input
from smidgen.layouts import within
from smidgen.method import Method
from smidgen.pools import with_pools
from smidgen.recipe import Recipe, Term, as_recipe
from smidgen.rows import SHARED, Row, Shape, safetensors_size
from smidgen.sites import Site, find_sites, find_tables
from smidgen.stacks import in_stack
from smidgen.sublayers import find_heads, find_sublayers
from smidgen.unfit import (
    no_match,
    refuse_headless,
    refuse_no_room,
    refuse_part,
    refuse_passed_by,
    refuse_resized,
    refuse_twice,
    refuse_unfoldable,
    refuse_unsupported,
)
from smidgen.unread import read_sites, unread


@dataclass(frozen=True)
class Plan:
    """What a recipe will do to a model. The head is counted apart, the same in every recipe.

    `low` are sites of the head in or below the blocks: tensors that the checkpoint lacked. `spare` are names of the
    head's tensors that are new in the base, which the model may not use. `unread` are paths of modules that its class
    or configuration never reads, where the recipe would have trained something. `left_out` is what the recipe's words
    would cover and it does not, by place and reason.
    """

    recipe: Recipe
    model: str
    rows: tuple[Row, ...]
    head: tuple[tuple[str, Shape], ...]
    pretrained: int
    pooling: str | None
    reads: str | None
    costs: dict[str, Any] | None = field(default=None, compare=False)
    chosen: bool = False
    low: tuple[Site, ...] = field(default=(), compare=False)
    spare: tuple[str, ...] = field(default=(), compare=False)
    unread: tuple[str, ...] = field(default=(), compare=False)
    left_out: tuple[Gap, ...] = field(default=(), compare=False)

    @property
    def places(self) -> list[Site]:
        """Where something is trained that what lies above depends on, the class's own head apart."""
        return [row.site for row in self.rows if row.site.kind != SHARED] + list(self.low)

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
        placed = self.places
        if not placed:
            return "head"
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
            "unread": list(self.unread),
            "left_out": [asdict(gap) for gap in self.left_out],
            "tensors": {name: list(shape) for name, shape in self.saved.items()},
        }

    def __str__(self) -> str:
        lines = [f"{self.recipe} on {self.model}"]
        lines += [f"  {name:<60} {list(shape)}" for row in self.rows for name, shape in row.names()]
        lines.append(
            f"trains {self.trained:,} of {self.pretrained:,} values ({self.share:.4%}); "
            f"head apart {self.head_values:,}; file {self.file_bytes:,} bytes; lowest edit: {self.lowest}"
        )
        lines += [f"left out, never read: {path}" for path in self.unread]
        lines += [f"left out by {gap.method}: {gap}" for gap in self.left_out]
        return "\n".join(lines)


def resolve(
    model: nn.Module,
    recipe: str | Term | Recipe,
    pooling: str | None = None,
    head: Collection[str] | None = None,
) -> Plan:
    """Resolve a recipe on a model, which may live on the meta device and is not touched.

    Args:
        head: names of the head's parameters, as a delta has them; by default those of `head_names`.

    Raises:
        PlanError: a method matches nothing, two methods train the same tensor, nothing is trained, the base is
            quantised, layers are named on a model that shares them, or something random would be left out.
    """
    model, recipe = bare(model), as_recipe(recipe)
    refuse_unsupported(model, recipe)
    pooling = check_pooling(model, pooling)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    idle = set(unused_under(model, pooling))
    names, own = head_parts(model)
    names = names if head is None else tuple(name for name in parameters if name in head)
    trained = [name for name in names if name not in idle]
    closed = {id(parameters[name]) for name in (*trained, *idle)}
    owners = find_sites(model)
    sites = [*owners, *find_sublayers(model)]
    sites += [*find_heads(model, sites), *find_tables(model, sites), *find_input(model)]
    barred = [site for site in sites if any(within(site.path, path) for path in without_gradient(model))]
    sites = [site for site in sites if site not in barred]
    left = _unread(recipe, sites, unread(model))
    sites = read_sites(model, sites)
    try:
        rows = _all_rows(model, recipe, sites, parameters, closed)
    except PlanError as error:
        raise PlanError(f"{error}; {type(model).__name__} never reads {', '.join(left)}") if left else error from None
    refuse_no_room(model, rows)
    refuse_twice(rows, parameters)
    refuse_unfoldable(rows)
    refuse_headless(model, recipe, rows, trained)
    refuse_resized(model, recipe)
    outside = {id(parameters[name]) for name in names}
    pretrained = sum(p.numel() for n, p in model.named_parameters() if id(p) not in outside)
    shapes = tuple((name, tuple(parameters[name].shape)) for name in trained)
    spare = tuple(name for name in trained if name not in own)
    return Plan(
        recipe,
        type(model).__name__,
        tuple(rows),
        shapes,
        pretrained,
        pooling,
        own_pooling(model),
        low=_low(owners, spare if isinstance(model, PreTrainedModel) else trained),
        spare=spare,
        unread=left,
        left_out=_gaps(model, recipe, sites, barred, rows, closed),
    )


def _unread(recipe: Recipe, sites: Sequence[Site], closed: Sequence[str]) -> tuple[str, ...]:
    """Those of the parts that are never read in which the recipe has sites."""
    inside = [site for site in sites if any(within(site.path, path) for path in closed)]
    methods = [term for term in recipe if isinstance(term, Method)]
    wanted = [site.path for site in inside if any(term.trains(site) or term.acts(site) for term in methods)]
    return tuple(path for path in closed if any(within(place, path) for place in wanted))


def _gaps(
    model: nn.Module, recipe: Recipe, sites: list[Site], barred: list[Site], rows: list[Row], closed: Collection[int]
) -> tuple[Gap, ...]:
    """What each method leaves out, the head, what is never read and what lies outside its `stack` apart."""
    found: list[Gap] = []
    for index, method in enumerate(recipe):
        assert isinstance(method, Method)
        inner = ((s, model.get_submodule(s.path).parameters()) for s in in_stack(method, [*sites, *barred]))
        near = [site for site, parameters in inner if not all(id(p) in closed for p in parameters)]
        here = [row for row in rows if row.index == index and row.site.kind != SHARED]
        reach = [site for site in near if site not in barred]
        found += left_out(method, model, reach, [site for site in near if site in barred], here)
    return tuple(found)


def _all_rows(
    model: nn.Module, recipe: Recipe, sites: list[Site], parameters: dict[str, nn.Parameter], closed: set[int]
) -> list[Row]:
    found: dict[int, list[Row]] = {}
    terms = [(index, method) for index, method in enumerate(recipe) if isinstance(method, Method)]
    if len(terms) < len(recipe):
        raise PlanError(f"{next(term for term in recipe if not isinstance(term, Method))} is not a method")
    for index, method in sorted(terms, key=lambda term: term[1].gives_way()):
        refuse_part(recipe, index, method)
        near = in_stack(method, sites)
        method.check(near)
        others = [row for rows in found.values() for row in rows if not row.added and not recipe.narrows(row.index)]
        taken = {id(parameters[name]) for row in others for name, _ in row.names()} if method.gives_way() else set()
        here = list(_rows(index, method, near, parameters, closed | taken))
        if not here and _wants_sites(method):
            raise PlanError(no_match(method, model, near))
        refuse_passed_by(method, model, near, here)
        found[index] = list(with_pools(here)) if method.overrides("shared") else here
    return [row for index in sorted(found) for row in found[index]]


def _low(sites: list[Site], names: Collection[str]) -> tuple[Site, ...]:
    """The sites of these parameters that are registered before the last block ends."""
    last = max((i for i, site in enumerate(sites) if site.layer is not None), default=-1)
    owners = {name.rpartition(".")[0] for name in names}
    return tuple(site for site in sites[: last + 1] if site.path in owners and site.rows is None)


def _wants_sites(method: Method) -> bool:
    return method.overrides("trains") or method.overrides("acts")


def _rows(
    index: int, method: Method, sites: list[Site], parameters: dict[str, nn.Parameter], closed: set[int]
) -> Iterator[Row]:
    seen: set[int] = set()
    for site in sites:
        prefix = f"{site.path}." if site.path else ""
        owned = {term: parameters[prefix + term] for term, _ in site.terms}
        # one without values (DINOv3's registers, of which there may be none) can neither move nor be rounded
        trained = [t for t in method.trains(site) if owned[t].numel() and id(owned[t]) not in closed | seen]
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
