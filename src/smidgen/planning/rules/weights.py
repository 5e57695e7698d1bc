"""Weights that no called map owns: what is added is folded into them while they are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smidgen.common.errors import PlanError
from smidgen.methods.base import Method
from smidgen.methods.capabilities import Merges
from smidgen.planning.entry import Entry
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

    def refuse_together(self, model: nn.Module, entries: Sequence[Entry]) -> None:
        """The input of a weight that is read cannot be dropped, nor can the weight be trained in place as well."""
        trained = {entry.name(term): entry for entry in entries if not entry.added for term, _ in entry.terms}
        for entry in entries:
            if not isinstance(entry.site, WeightSite):
                continue
            name = f"{entry.site.path}.{entry.site.term}"
            if other := trained.get(name):
                raise PlanError(f"{other.method} trains {name} and {entry.method} adds to it; leave one out")
            if entry.method.input_dropout():
                raise PlanError(
                    f"{entry.method} drops inputs, and what enters {name} is not seen; leave dropout= out there"
                )
