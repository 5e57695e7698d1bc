"""What an added tensor starts at: a function of (seed, name) and the site's own tensors, not of what else is there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smidgen.common.seeding import seeded
from smidgen.methods.capabilities import StartsFromBase, StartsFromOriginal
from smidgen.planning.entry import Entry
from smidgen.planning.shared_tensors import fresh_shared
from smidgen.planning.site_rules import rules_of
from smidgen.sites.quantised.maps import own_weight
from smidgen.sites.quantised.originals import originals_of
from smidgen.sites.weight_view import seen_from


def initial(entry: Entry, seed: int, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Fresh tensors of an added entry, symbol -> tensor; torch's global generator is left alone.

    Args:
        model: with nothing attached, for methods that start from the base; None where only shapes matter.
    """
    with seeded(seed, entry.site.path, entry.key):
        fresh = (
            fresh_shared(entry.method, entry.sites)
            if entry.owns_shared
            else rules_of(entry.site).fresh(entry.method, entry.site)
        )
        method = entry.method
        if model is not None and isinstance(method, StartsFromOriginal):
            return _from_original(entry, fresh, model)
        if model is None or entry.owns_shared or not isinstance(method, StartsFromBase):
            return fresh
        base = rules_of(entry.site).base_tensors(model, entry.site)
        if base is None:
            return fresh
        like = next(iter(base.values()))
        fresh = {k: v.to(like) for k, v in fresh.items()}
        started = method.from_base(fresh, base, entry.site)
        return {k: v.contiguous() for k, v in started.items()}  # another layout would round differently


def _from_original(entry: Entry, fresh: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The start from what the site's map lost when it was quantised; `fresh` for one that was not."""
    method, site = entry.method, entry.site
    assert isinstance(method, StartsFromOriginal)
    weight = own_weight(model.get_submodule(site.path))
    originals = None if weight is None else originals_of(model, method)
    if weight is None or originals is None:
        return fresh
    base = rules_of(site).base_tensors(model, site)
    assert base is not None
    whole = originals.weight(site.path, (weight.shape[0], weight.shape[1])).to(weight)
    started = method.from_original(fresh, base, seen_from(site, whole, None)["weight"], site)
    return {symbol: tensor.contiguous() for symbol, tensor in started.items()}


def shared_indices(entry: Entry, seed: int) -> dict[str, Tensor]:
    """Which parts of what its sites share an entry uses, symbol -> (n,) int64."""
    with seeded(seed, entry.site.path, entry.key, "routes"):
        return {symbol: index.long() for symbol, index in entry.method.shared_indices(entry.site, entry.sites).items()}


def blank(entry: Entry) -> dict[str, Tensor]:
    """Tensors of an added entry whose values are to be filled in, symbol -> tensor; NaN shows one that was forgotten.

    An entry of which a part is trained starts as `initial` says: a file need not hold the rest.
    """
    return (
        initial(entry, 0) if entry.subsets else {symbol: torch.full(shape, torch.nan) for symbol, shape in entry.terms}
    )
