"""Modules that own parameters, and embeddings as linear maps of one-hot vectors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from smidgen.methods.capabilities import EditsInput, EditsOutput, ReadsWeight, Tensors
from smidgen.planning.site_rules import SiteRules
from smidgen.sites.discovery import find_tables
from smidgen.sites.site import OwnerSite, Site, TableSite
from smidgen.sites.weight_view import parameters_of, seen_from


class ModuleRules(SiteRules):
    """What is called with one tensor and gives one."""

    sites = (OwnerSite, TableSite)
    capabilities = (EditsInput, EditsOutput, ReadsWeight)

    def find(self, model: nn.Module, found: Sequence[Site]) -> Sequence[Site]:
        """The tables; modules that own parameters are found before all others."""
        return find_tables(model, found)

    def base_tensors(self, model: nn.Module, site: Site) -> Tensors:
        """ "weight" (width_out, width_in) and, where there is one, "bias" (width_out,)."""
        return seen_from(site, *parameters_of(model.get_submodule(site.path)))
