"""Weights that no called map owns: what is added is folded into them while they are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smidgen.common.errors import PlanError
from smidgen.methods.base import Method
from smidgen.methods.capabilities import Merges
from smidgen.planning.row import Row
from smidgen.planning.site_rules import SiteRules
from smidgen.sites.discovery import find_weights
from smidgen.sites.site import Site, WeightSite


class WeightRules(SiteRules):
    """A method acts by its merged weight; of several in one parameter, each has tensors of its own."""

    sites = (WeightSite,)
    capabilities = (Merges,)

    def find(self, model: nn.Module, found: Sequence[Site]) -> Sequence[Site]:
        """Those of experts, of nn.MultiheadAttention and of maps that are read."""
        return find_weights(model, found)

    def fresh(self, method: Method, site: Site) -> dict[str, Tensor]:
        """Tensors for one weight, or for each of several, stacked: (count, ...)."""
        assert isinstance(site, WeightSite)
        if site.count == 1:
            return method.init(site)
        each = [method.init(site) for _ in range(site.count)]
        return {symbol: torch.stack([tensors[symbol] for tensors in each]) for symbol in each[0]}

    def refuse_together(self, model: nn.Module, rows: Sequence[Row]) -> None:
        """The input of a weight that is read cannot be dropped, nor can the weight be trained in place as well."""
        trained = {row.name(term): row for row in rows if not row.added for term, _ in row.terms}
        for row in rows:
            if not isinstance(row.site, WeightSite):
                continue
            name = f"{row.site.path}.{row.site.term}"
            if other := trained.get(name):
                raise PlanError(f"{other.method} trains {name} and {row.method} adds to it; leave one out")
            if row.method.input_dropout():
                raise PlanError(
                    f"{row.method} drops inputs, and what enters {name} is not seen; leave dropout= out there"
                )
