"""Attention, cross-attention and feed-forward sublayers of blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from smidgen.methods.base import Method
from smidgen.methods.capabilities import EditsInput, EditsOutput, ReadsWeight, Tensors
from smidgen.planning.site_rules import SiteRules
from smidgen.sites.site import Site, Sublayer
from smidgen.sites.sublayers import find_sublayers
from smidgen.sites.weight_view import parameters_of, seen_from


class SublayerRules(SiteRules):
    """From the map that a sublayer is entered by to the one that it is left by."""

    sites = (Sublayer,)
    capabilities = (EditsInput, EditsOutput, ReadsWeight)
    holds = True

    def find(self, model: nn.Module, found: Sequence[Site]) -> Sequence[Site]:
        """Those of blocks whose layout is known."""
        return find_sublayers(model)

    def base_tensors(self, model: nn.Module, site: Site) -> Tensors:
        """Those of the map that it is left by."""
        return seen_from(site, *parameters_of(model.get_submodule(site.path)))

    def unmatched(self, method: Method, model: nn.Module, sites: Sequence[Site]) -> str:
        """The sublayers that there are."""
        kinds = dict.fromkeys(site.kind for site in sites if isinstance(site, Sublayer))
        return f"; sublayers found: {', '.join(kinds)}" if kinds else ""
