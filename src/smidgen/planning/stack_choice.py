"""Which part of a model `stack=` means: a tower, a side, any module by its path or the end of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile

from smidgen.common.errors import PlanError, nearest
from smidgen.methods.base import Method
from smidgen.sites.roles import within
from smidgen.sites.site import Site


def in_stack(method: Method, sites: Sequence[Site]) -> list[Site]:
    """The sites that lie in the method's stack; all without one.

    Raises:
        PlanError: no module of this name holds any site; names the nearest.
    """
    if method.stack is None:
        return list(sites)
    if not isinstance(method.stack, str) or not method.stack:
        raise PlanError(f"{method}: stack={method.stack!r} must be a module path or the end of one")
    paths = {path for site in sites for path in _around(site.path)}
    chosen = {path for path in paths if path == method.stack or path.endswith("." + method.stack)}
    found = [site for site in sites if any(within(site.path, path) for path in chosen)]
    if not found:
        stacks = dict.fromkeys(site.stack for site in sites if site.stack)
        names = {path.rpartition(".")[2] for path in paths}
        raise PlanError(
            f"{method}: stack={method.stack!r} is no module of this model that owns parameters"
            f"{nearest(method.stack, names)}; its blocks lie in {', '.join(stacks) or 'no list'}"
        )
    return found


def common_stack(reached: Iterable[str], others: Sequence[str]) -> str:
    """The name of the largest module around all of the `reached` tensors that holds none of the others; "" if none."""
    paths = [name.split(".")[:-1] for name in reached]
    together = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    parts = [names[0] for names in together]
    held = [any(within(name, ".".join(parts[:n])) for name in others) for n in range(1, len(parts) + 1)]
    if not held or held[-1]:
        return ""
    path = ".".join(parts[: held.index(False) + 1])
    last = path.rpartition(".")[2]
    return path if last.isdigit() or any(last in name.split(".") for name in others) else last


def _around(path: str) -> Iterable[str]:
    """A path and those of all modules around it."""
    while path:
        yield path
        path = path.rpartition(".")[0]
