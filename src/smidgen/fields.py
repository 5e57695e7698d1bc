"""What fields of methods say: layers, target roles, sizes; and the mistakes in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from smidgen.errors import PlanError, RecipeError, nearest
from smidgen.layers import layer_indices
from smidgen.sites import Site

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
        if found := next((site for site in sites if _at(site, name) and site.kind not in ("linear", "input")), None):
            raise PlanError(
                f"{method}: {field} names {name!r}, which is no linear map but {_what(found)} ({found.path})"
                + (f"; Full(target={name!r}) trains it whole" if field == "target" else "")
            )
        endings = {site.path.rpartition(".")[2] for site in sites if site.kind == "linear"}
        inside = {site.path.rpartition(".")[2] for site in sites if site.kind == "linear" and _in(site, name)}
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
    paths = [site.path, *(f"{site.path}.{term}" for term, _ in site.terms)] if site.terms and site.rows is None else []
    return any(f".{path}".endswith("." + name) for path in paths)


def _in(site: Site, name: str) -> bool:
    return f".{name}." in f".{site.path}"


def _what(site: Site) -> str:
    """What a site is that is no linear map, in a few words."""
    if site.kind != "other":
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


def targeted(site: Site, target: Sequence[str]) -> bool:
    """Whether a linear site has one of the roles, or lies at a module path ending in one of the names."""
    if site.kind != "linear":
        return False
    return any(_matches(site, name) for name in target)


def at_table(site: Site, target: Sequence[str]) -> bool:
    """Whether a site is a table of embeddings whose path is or ends in one of the names."""
    return site.kind == "table" and any(f".{site.path}".endswith("." + name) for name in target)


def _matches(site: Site, name: str) -> bool:
    if name == "linear":
        return site.rows is None and "block" in site.roles
    if name in site.roles and name in LINEAR_ROLES:
        return True
    return site.rows is None and (site.path == name or site.path.endswith("." + name))


LINEAR_ROLES = ("query", "key", "value", "attention_out", "ff_in", "ff_out")


def one_of(method: str, field: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise RecipeError, naming the nearest, unless `value` is among `allowed`."""
    if value not in allowed:
        hint = nearest(str(value), allowed)
        raise RecipeError(f"{method}: {field}={value!r} is not one of {', '.join(allowed)}{hint}")


def at_least(method: str, field: str, value: Any, least: float, kind: type = int) -> None:
    """Raise RecipeError unless `value` is a number of the kind and not below `least`."""
    good = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not good or value < least:
        raise RecipeError(f"{method}: {field}={value!r} must be a {'whole ' * (kind is int)}number of at least {least}")


def above(method: str, field: str, value: Any, least: float) -> None:
    """Raise RecipeError unless `value` is a finite number above `least`."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not (good and value > least and math.isfinite(value)):
        raise RecipeError(f"{method}: {field}={value!r} must be a number above {least}")


def share_field(method: str, field: str, value: Any) -> None:
    """Raise RecipeError unless `value` is a number in [0, 1)."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not (good and 0 <= value < 1):
        raise RecipeError(f"{method}: {field}={value!r} must lie in [0, 1)")


def flag(method: str, field: str, value: Any) -> None:
    """Raise RecipeError unless `value` is True or False: 'no' would count as yes."""
    if not isinstance(value, bool):
        raise RecipeError(f"{method}: {field}={value!r} must be True or False")


def names_field(method: str, field: str, value: Any, least: int = 1) -> None:
    """Raise RecipeError unless `value` is a name or a tuple of at least `least` names."""
    names = as_names(value) if isinstance(value, str | tuple) else (None,)
    if len(names) < least or not all(isinstance(name, str) for name in names):
        example = ("attention", "feed_forward") if field == "site" else ("query", "value")
        raise RecipeError(f"{method}: {field}={value!r} must be a name or a tuple of names, such as {example}")


def layers_field(method: str, value: Layers) -> None:
    """Raise RecipeError unless `value` can name layers: None, 3, (0, 5), "top:2", "bottom:2" or "2:5"."""
    if value is None:
        return
    try:
        layer_indices(value, 1_000_000)
    except ValueError as error:
        raise RecipeError(f"{method}: {error}") from None
