"""What an added tensor starts at: a function of (seed, name) and the site's own tensors, not of what else is there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smidgen.common.seeding import seeded
from smidgen.methods.capabilities import StartsFromBase
from smidgen.planning.row import Row
from smidgen.planning.shared_tensors import fresh_shared
from smidgen.planning.site_rules import rules_of


def initial(row: Row, seed: int, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Fresh tensors of an added row, symbol -> tensor; torch's global generator is left alone.

    Args:
        model: with nothing attached, for methods that start from the base; None where only shapes matter.
    """
    with seeded(seed, row.site.path, row.key):
        fresh = (
            fresh_shared(row.method, row.sites) if row.owns_shared else rules_of(row.site).fresh(row.method, row.site)
        )
        method = row.method
        if model is None or row.owns_shared or not isinstance(method, StartsFromBase):
            return fresh
        base = rules_of(row.site).base_tensors(model, row.site)
        if base is None:
            return fresh
        like = next(iter(base.values()))
        fresh = {k: v.to(like) for k, v in fresh.items()}
        started = method.from_base(fresh, base, row.site)
        return {k: v.contiguous() for k, v in started.items()}  # another layout would round differently


def routes(row: Row, seed: int) -> dict[str, Tensor]:
    """Which parts of what its sites share a row uses, symbol -> (n,) int64."""
    with seeded(seed, row.site.path, row.key, "routes"):
        return {symbol: index.long() for symbol, index in row.method.routes(row.site, row.sites).items()}


def blank(row: Row) -> dict[str, Tensor]:
    """Tensors of an added row whose values are to be filled in, symbol -> tensor; NaN shows one that was forgotten.

    A row of which a part is trained starts as `initial` says: a file need not hold the rest.
    """
    return initial(row, 0) if row.subsets else {symbol: torch.full(shape, torch.nan) for symbol, shape in row.terms}
