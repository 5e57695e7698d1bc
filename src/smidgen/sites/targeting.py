"""Which sites the fields of a method name: layers, roles, module paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from smidgen.common.errors import PlanError, nearest
from smidgen.sites.layer_spec import layer_indices
from smidgen.sites.site import InputSite, LinearSite, OtherSite, Site, UncalledSite, WeightSite

Layers = str | int | tuple[int, ...] | None


def in_layers(site: Site, layers: Layers) -> bool:
    """Whether the site lies in one of the wanted layers; sites outside all blocks only count when `layers` is None.

    Raises:
        PlanError: the stack has no such layer.
    """
    if layers is None:
        return True
    if site.layer is None:
        return False
    try:
        return site.layer in (layer_indices(layers, site.depth) or ())
    except ValueError as error:
        raise PlanError(f"{error}; layers are counted from the input of each stack") from None


def check_targets(method: str, field: str, names: Sequence[str], sites: Sequence[Site]) -> None:
    """Raise PlanError unless each name stands for at least one linear map: says what it is, or names the nearest."""
    for name in names:
        if any(targeted(site, (name,)) for site in sites):
            continue
        others = (site for site in sites if not isinstance(site, LinearSite | InputSite))
        if found := next((site for site in others if _at(site, name)), None):
            raise PlanError(
                f"{method}: {field} names {name!r}, which is no linear map but {_what(found)} ({found.path})"
                + (f"; Full(target={name!r}) trains it whole" if field == "target" else "")
            )
        maps = [site for site in sites if isinstance(site, LinearSite)]
        endings = {site.path.rpartition(".")[2] for site in maps}
        inside = {site.path.rpartition(".")[2] for site in maps if _in(site, name)}
        if inside:
            raise PlanError(
                f"{method}: {field} names {name!r}, which is no linear map but a module that holds some; "
                f"name {', '.join(sorted(inside))}"
            )
        known = {role for site in sites for role in site.roles if role in LINEAR_ROLES} | endings
        known |= {"linear"} if any(targeted(site, ("linear",)) for site in sites) else set()
        raise PlanError(
            f"{method}: {field} names {name!r}, which this model does not have{nearest(name, known)}; "
            f"it has {', '.join(sorted(known)) or 'no linear map'}"
        )


def _at(site: Site, name: str) -> bool:
    """Whether the path of a site that owns tensors, or of one of them, is or ends in a name."""
    paths = [site.path, *(f"{site.path}.{term}" for term, _ in site.terms)] if site.terms and not site.part else []
    return any(f".{path}".endswith("." + name) for path in paths)


def _in(site: Site, name: str) -> bool:
    return f".{name}." in f".{site.path}"


def _what(site: Site) -> str:
    """What a site is that is no linear map, in a few words."""
    if not isinstance(site, OtherSite | UncalledSite):
        return {"embedding": "an embedding", "conv": "a convolution", "norm": "a norm"}.get(site.kind, site.kind)
    terms = dict(site.terms)
    if "in_proj_weight" in terms:
        return "an nn.MultiheadAttention, which reads its maps and calls none"
    if any(len(shape) == 3 and shape[0] > 1 for shape in terms.values()):
        return "several weights stacked in one parameter"
    return "a module with a forward of its own, or one that is read and never called"


def as_names(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """One name or several, as several."""
    return (value,) if isinstance(value, str) else value


def targeted(site: Site, target: Sequence[str]) -> TypeGuard[LinearSite]:
    """Whether a linear site has one of the roles, or lies at a module path ending in one of the names."""
    return isinstance(site, LinearSite) and any(_matches(site, name) for name in target)


def names_weight(site: Site, names: Sequence[str]) -> bool:
    """Whether a name is, or ends in, module and weight of a site: "experts.gate_up_proj", "out_proj.weight"."""
    if not isinstance(site, WeightSite):
        return False
    path = f".{site.path}.{site.term}"
    return any("." in name and path.endswith(f".{name}") for name in names)


def _matches(site: LinearSite, name: str) -> bool:
    if name == "linear":
        return site.rows is None and "block" in site.roles
    if name in site.roles and name in LINEAR_ROLES:
        return True
    return site.rows is None and (site.path == name or site.path.endswith("." + name))


LINEAR_ROLES = ("query", "key", "value", "attention_out", "ff_in", "ff_out")
