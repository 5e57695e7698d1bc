"""Tensors above the sites: what several of them share is owned once, by a row of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from smidgen.methods.base import Method
from smidgen.methods.capabilities import Shares
from smidgen.planning.row import Row
from smidgen.sites.site import SharedSite, Site


def with_pools(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows of a method that shares tensors: for each group the owner, then the sites that use what it owns."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.method.group(row.site), []).append(row)
    for name, found in groups.items():
        sites, first = tuple(row.site for row in found), found[0]
        with torch.device("meta"):
            terms = tuple((symbol, tuple(t.shape)) for symbol, t in fresh_shared(first.method, sites).items())
        yield Row(first.index, first.method, _owner(name), terms, True, sites=sites)
        for row in found:
            routes = tuple((symbol, tuple(t.shape)) for symbol, t in row.method.routes(row.site, sites).items())
            yield replace(row, sites=sites, routes=routes)


def fresh_shared(method: Method, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Fresh tensors that the sites of a group share."""
    assert isinstance(method, Shares)  # or there was no row that owns them
    return method.shared(sites)


def _owner(name: str) -> SharedSite:
    return SharedSite("", frozenset({name}))


def pool_key(row: Row) -> str | None:
    """Name of the edit, at the model itself, that owns what a row's site shares with others."""
    if not row.sites or row.owns_shared:
        return None
    return replace(row, site=_owner(row.method.group(row.site))).key
