"""Tensors above the sites: what several of them share is owned once, by an entry of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from smidgen.methods.base import Method
from smidgen.methods.capabilities import Shares
from smidgen.planning.entry import Entry
from smidgen.sites.site import SharedSite, Site


def with_pools(entries: Sequence[Entry]) -> Iterator[Entry]:
    """The entries of a method that shares tensors: for each group the owner, then the sites that use what it owns."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.method.group(entry.site), []).append(entry)
    for name, found in groups.items():
        sites, first = tuple(entry.site for entry in found), found[0]
        with torch.device("meta"):
            terms = tuple((symbol, tuple(t.shape)) for symbol, t in fresh_shared(first.method, sites).items())
        yield Entry(first.index, first.method, _owner(name), terms, True, sites=sites)
        for entry in found:
            shared_indices = tuple(
                (symbol, tuple(t.shape)) for symbol, t in entry.method.shared_indices(entry.site, sites).items()
            )
            yield replace(entry, sites=sites, shared_indices=shared_indices)


def fresh_shared(method: Method, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Fresh tensors that the sites of a group share."""
    assert isinstance(method, Shares)  # or there was no entry that owns them
    return method.shared(sites)


def _owner(name: str) -> SharedSite:
    return SharedSite("", frozenset({name}))


def pool_key(entry: Entry) -> str | None:
    """Name of the edit, at the model itself, that owns what an entry's site shares with others."""
    if not entry.sites or entry.owns_shared:
        return None
    return replace(entry, site=_owner(entry.method.group(entry.site))).key
