"""What fields of methods say: layers, target roles, sizes; and the mistakes in them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from smidgen.common.errors import RecipeError, nearest
from smidgen.sites.layer_spec import layer_indices
from smidgen.sites.site import Site
from smidgen.sites.targeting import Layers, as_names


def named(site: Site, target: Sequence[str]) -> bool:
    """Whether the path of a site is or ends in one of the names."""
    return any(f".{site.path}".endswith("." + name) for name in target)


def one_of(method: str, field: str, value: object, allowed: Sequence[str]) -> None:
    """Raise RecipeError, naming the nearest, unless `value` is among `allowed`."""
    if value not in allowed:
        hint = nearest(str(value), allowed)
        raise RecipeError(f"{method}: {field}={value!r} is not one of {', '.join(allowed)}{hint}")


def _number(value: object) -> float | None:
    """A value that is a number; True and False are none."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def at_least(method: str, field: str, value: object, least: float, kind: type = int) -> None:
    """Raise RecipeError unless `value` is a number of the kind and not below `least`."""
    number = _number(value)
    if number is None or (kind is int and not isinstance(number, int)) or number < least:
        raise RecipeError(f"{method}: {field}={value!r} must be a {'whole ' * (kind is int)}number of at least {least}")


def above(method: str, field: str, value: object, least: float) -> None:
    """Raise RecipeError unless `value` is a finite number above `least`."""
    number = _number(value)
    if number is None or not (number > least and math.isfinite(number)):
        raise RecipeError(f"{method}: {field}={value!r} must be a number above {least}")


def share_field(method: str, field: str, value: object) -> None:
    """Raise RecipeError unless `value` is a number in [0, 1)."""
    number = _number(value)
    if number is None or not 0 <= number < 1:
        raise RecipeError(f"{method}: {field}={value!r} must lie in [0, 1)")


def flag(method: str, field: str, value: object) -> None:
    """Raise RecipeError unless `value` is True or False: 'no' would count as yes."""
    if not isinstance(value, bool):
        raise RecipeError(f"{method}: {field}={value!r} must be True or False")


def names_field(method: str, field: str, value: object, least: int = 1) -> None:
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
