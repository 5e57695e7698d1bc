"""Plan: a recipe resolved on a model, before anything is touched."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.common.errors import PlanError
from smidgen.common.wrappers import bare
from smidgen.methods.base import Method, adds, trains_in_place
from smidgen.methods.capabilities import Shares
from smidgen.planning.compatibility import (
    no_match,
    refuse_headless,
    refuse_part,
    refuse_quantised,
    refuse_resized,
    refuse_twice,
    refuse_two_starts,
    refuse_unfoldable,
    refuse_unsupported,
    refuse_without_kernel,
)
from smidgen.planning.entry import Entry, Shape
from smidgen.planning.gaps import Gap, left_out, meant
from smidgen.planning.plans import Plan
from smidgen.planning.rules.builtin import all_rules
from smidgen.planning.shared_tensors import with_pools
from smidgen.planning.site_rules import check_capable, rules_for, rules_of
from smidgen.planning.stack_choice import in_stack
from smidgen.recipe.recipe import Recipe, Term, as_recipe
from smidgen.sites.discovery import find_sites
from smidgen.sites.module_calls import without_gradient
from smidgen.sites.quantised.maps import logical_counts
from smidgen.sites.roles import within
from smidgen.sites.site import Site
from smidgen.sites.task_head import check_pooling, head_parts, own_pooling, unused_under
from smidgen.sites.unread_parts import read_sites, unread


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
        PlanError: a method matches nothing, two methods train the same tensor, nothing is trained, a quantised weight
            would be trained, layers are named on a model that shares them, or something random would be left out.
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
    sites: list[Site] = [*owners]
    for rules in all_rules():
        sites += rules.find(model, sites)
    barred = [site for site in sites if any(within(site.path, path) for path in without_gradient(model))]
    sites = [site for site in sites if site not in barred]
    left = _unread(model, recipe, sites, unread(model))
    sites = read_sites(model, sites)
    try:
        entries = _all_entries(model, recipe, sites, parameters, closed)
    except PlanError as error:
        raise PlanError(f"{error}; {type(model).__name__} never reads {', '.join(left)}") if left else error from None
    for rules in all_rules():
        rules.refuse_together(model, entries)
    refuse_twice(entries, parameters)
    refuse_quantised(model, entries)
    refuse_two_starts(entries)
    refuse_unfoldable(entries)
    refuse_without_kernel(model, entries)
    refuse_headless(model, recipe, entries, trained)
    refuse_resized(model, recipe)
    outside = {id(parameters[name]) for name in names}
    counts = logical_counts(model)
    pretrained = sum(counts.get(id(p), p.numel()) for n, p in model.named_parameters() if id(p) not in outside)
    shapes = tuple((name, tuple(parameters[name].shape)) for name in trained)
    spare = tuple(name for name in trained if name not in own)
    return Plan(
        recipe,
        type(model).__name__,
        tuple(entries),
        shapes,
        pretrained,
        pooling,
        own_pooling(model),
        low=_low(owners, spare if isinstance(model, PreTrainedModel) else trained),
        spare=spare,
        unread=left,
        left_out=_gaps(model, recipe, sites, barred, entries, closed),
    )


def _unread(model: nn.Module, recipe: Recipe, sites: Sequence[Site], closed: Sequence[str]) -> tuple[str, ...]:
    """Those of the parts that are never read in which the recipe has sites, or would have some if they were known."""
    inside = [site for site in sites if any(within(site.path, path) for path in closed)]
    methods = [term for term in recipe if isinstance(term, Method)]
    wanted = [site.path for site in inside if any(term.trains(site) or term.acts(site) for term in methods)]
    wanted += [path for term in methods for path in meant(term, model, inside)] if inside else []
    return tuple(path for path in closed if any(within(place, path) for place in wanted))


def _gaps(
    model: nn.Module,
    recipe: Recipe,
    sites: list[Site],
    barred: list[Site],
    entries: list[Entry],
    closed: Collection[int],
) -> tuple[Gap, ...]:
    """What each method leaves out, the head, what is never read and what lies outside its `stack` apart."""
    found: list[Gap] = []
    for index, method in enumerate(recipe):
        assert isinstance(method, Method)
        inner = ((s, model.get_submodule(s.path).parameters()) for s in in_stack(method, [*sites, *barred]))
        near = [site for site, parameters in inner if not all(id(p) in closed for p in parameters)]
        here = [entry for entry in entries if entry.index == index and not entry.owns_shared]
        reach = [site for site in near if site not in barred]
        found += left_out(method, model, reach, [site for site in near if site in barred], here)
    return tuple(found)


def _all_entries(
    model: nn.Module, recipe: Recipe, sites: list[Site], parameters: dict[str, nn.Parameter], closed: set[int]
) -> list[Entry]:
    """The entries of all methods in the recipe's order; those that give way are resolved last."""
    found: dict[int, list[Entry]] = {}
    terms = [(index, method) for index, method in enumerate(recipe) if isinstance(method, Method)]
    if len(terms) < len(recipe):
        raise PlanError(f"{next(term for term in recipe if not isinstance(term, Method))} is not a method")
    for index, method in sorted(terms, key=lambda term: term[1].gives_way()):
        refuse_part(recipe, index, method)
        near = in_stack(method, sites)
        method.check(near)
        others = [
            entry
            for entries in found.values()
            for entry in entries
            if not entry.added and not recipe.narrows(entry.index)
        ]
        taken = {id(parameters[name]) for entry in others for name, _ in entry.names()} if method.gives_way() else set()
        here = list(_entries(index, method, near, parameters, closed | taken))
        if not here and (adds(type(method)) or trains_in_place(type(method))):
            raise PlanError(no_match(method, model, near))
        for rules in rules_for(method):
            rules.refuse(method, model, near, here)
        found[index] = list(with_pools(here)) if isinstance(method, Shares) else here
    return [entry for index in sorted(found) for entry in found[index]]


def _low(sites: Sequence[Site], names: Collection[str]) -> tuple[Site, ...]:
    """The sites of these parameters that are registered before the last block ends."""
    last = max((i for i, site in enumerate(sites) if site.layer is not None), default=-1)
    owners = {name.rpartition(".")[0] for name in names}
    return tuple(site for site in sites[: last + 1] if site.path in owners and not site.part)


def _entries(
    index: int, method: Method, sites: list[Site], parameters: dict[str, nn.Parameter], closed: set[int]
) -> Iterator[Entry]:
    """The entries of one method: at each site what it trains in place, then what it adds; no parameter of `closed`."""
    seen: set[int] = set()
    for site in sites:
        prefix = f"{site.path}." if site.path else ""
        owned = {term: parameters[prefix + term] for term, _ in site.terms}
        # one without values (DINOv3's registers, of which there may be none) can neither move nor be rounded
        shapes = dict(site.terms)
        trained = [t for t in method.trains(site) if owned[t].numel() and id(owned[t]) not in closed | seen]
        seen.update(id(owned[term]) for term in trained)
        if trained:
            yield Entry(index, method, site, tuple((t, shapes[t]) for t in trained), added=False)
        in_head = any(id(p) in closed for p in owned.values())
        if not in_head and method.acts(site):
            check_capable(method, site)
            with torch.device("meta"):
                tensors = rules_of(site).fresh(method, site)
                saved = method.settle(tensors, site) if method.settled() != method else {}
            yield Entry(index, method, site, _shapes(tensors), True, settled=_shapes(saved))


def _shapes(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, Shape], ...]:
    return tuple((symbol, tuple(tensor.shape)) for symbol, tensor in tensors.items())
