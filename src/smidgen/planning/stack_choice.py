"""Which part of a model `stack=` means: a tower, a side, any module by its path or the end of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from smidgen.common.errors import PlanError, nearest
from smidgen.methods.base import Method
from smidgen.sites.roles import within
from smidgen.sites.site import Site

NAMED = 4  # stacks that an advice names at most


def in_stack(method: Method, sites: Sequence[Site]) -> list[Site]:
    """The sites that lie in the method's stack, or in one of its stacks; all without one.

    Raises:
        PlanError: no module of this name holds any site; names the nearest.
    """
    if method.stack is None:
        return list(sites)
    names = (method.stack,) if isinstance(method.stack, str) else method.stack
    if not isinstance(names, tuple | list) or not names or not all(isinstance(n, str) and n for n in names):
        raise PlanError(f"{method}: stack={method.stack!r} must be a module path or the end of one, or several of them")
    paths = {path for site in sites for path in _around(site.path)}
    chosen: set[str] = set()
    for name in names:
        found = {path for path in paths if path == name or path.endswith("." + name)}
        if not found:
            stacks = dict.fromkeys(site.stack for site in sites if site.stack)
            known = {path.rpartition(".")[2] for path in paths}
            raise PlanError(
                f"{method}: stack={name!r} is no module of this model that owns parameters{nearest(name, known)}; "
                f"its blocks lie in {', '.join(stacks) or 'no list'}"
            )
        chosen |= found
    return [site for site in sites if any(within(site.path, path) for path in chosen)]


def stack_advice(reached: Iterable[str], others: Sequence[str]) -> str:
    """The field that keeps a recipe to what was reached, as it is written; "" where a few names cannot say it."""
    found = stacks_around(reached, others) if others else []
    if not 0 < len(found) <= NAMED:
        return ""
    return f"stack={found[0]!r}" if len(found) == 1 else f"stack={tuple(found)!r}"


def stacks_around(reached: Iterable[str], others: Sequence[str]) -> list[str]:
    """Names of the largest modules that hold all `reached` tensors and none of the others, for `stack=`.

    A module goes by the end of its path where that end leads nowhere else. Empty where some module owns tensors of
    both kinds itself.
    """
    wanted, around = list(reached), {path for name in others for path in _around(name)}
    found: dict[str, None] = {}
    for name in wanted:
        inside = [path for path in _around(name.rpartition(".")[0]) if path not in around]
        if not inside:
            return []
        found[inside[-1]] = None  # the largest
    names = [*wanted, *others]
    return [_short(path, names) for path in found]


def _short(path: str, names: Iterable[str]) -> str:
    """The shortest end of a path that is no number, and the end of no other module's path."""
    parts = path.split(".")
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        ends = (other for name in names for other in _around(name) if other == end or other.endswith("." + end))
        if not end[0].isdigit() and all(other == path for other in ends):
            return end
    return path


def _around(path: str) -> Iterable[str]:
    """A path and those of all modules around it."""
    while path:
        yield path
        path = path.rpartition(".")[0]
