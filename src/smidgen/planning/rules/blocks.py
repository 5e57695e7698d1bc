"""Blocks, and stacks of blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from smidgen.common.dtypes import master_dtype
from smidgen.common.errors import PlanError
from smidgen.methods.base import Method
from smidgen.methods.capabilities import EditsStates, RunsBeside, ShortensText, Tensors
from smidgen.planning.entry import Entry
from smidgen.planning.site_rules import SiteRules
from smidgen.sites.block_sites import find_block_sites, find_stack_sites
from smidgen.sites.roles import within
from smidgen.sites.site import BlockSite, Site, StackSite

NONE = "; it has no stack of blocks of a known width, each applied once"


class BlockRules(SiteRules):
    """Where hidden states leave a block."""

    sites = (BlockSite,)
    capabilities = (EditsStates, ShortensText)
    keeps_tokens = False

    def find(self, model: nn.Module, found: Sequence[Site]) -> Sequence[Site]:
        """Those of all stacks."""
        return find_block_sites(model, found)

    def base_tensors(self, model: nn.Module, site: Site) -> Tensors:
        """The block's own parameters, by their names in it."""
        return _parameters(model.get_submodule(site.path))

    def unmatched(self, method: Method, model: nn.Module, sites: Sequence[Site]) -> str:
        """That there are none."""
        return "" if any(isinstance(site, BlockSite) for site in sites) else NONE


class StackRules(SiteRules):
    """A network beside a stack, which runs without gradient."""

    sites = (StackSite,)
    capabilities = (RunsBeside,)
    keeps_tokens = False

    def find(self, model: nn.Module, found: Sequence[Site]) -> Sequence[Site]:
        """All stacks of one width."""
        return find_stack_sites(model, found)

    def base_tensors(self, model: nn.Module, site: Site) -> Tensors:
        """The parameters of the stack's blocks, by their names in it: "0.attention.query.weight"."""
        return _parameters(model.get_submodule(site.stack))

    def unmatched(self, method: Method, model: nn.Module, sites: Sequence[Site]) -> str:
        """That there are none."""
        return "" if any(isinstance(site, StackSite) for site in sites) else NONE

    def refuse_together(self, model: nn.Module, entries: Sequence[Entry]) -> None:
        """What lies in or below a stack that runs without gradient cannot be trained, nor two networks stand there."""
        beside = [entry for entry in entries if isinstance(entry.site, StackSite)]
        for entry in beside:
            others = (other for other in entries if other is not entry and not other.owns_shared)
            for other in others:
                if isinstance(other.site, StackSite) and other.site.stack == entry.site.stack:
                    raise PlanError(
                        f"{entry.method} and {other.method} both take the place of what leaves {entry.site.stack}"
                    )
                if within(other.site.path, entry.site.stack) or _below(model, other.site, entry.site):
                    raise PlanError(
                        f"{entry.method} runs {entry.site.stack} without gradient, so {other.method} at "
                        f"{other.site.name} would not learn; leave one out"
                    )


def _below(model: nn.Module, site: Site, stack: Site) -> bool:
    """Whether a site outside of all stacks is registered before a stack, as embeddings are."""
    order = [path for path, _ in model.named_modules()]
    return not site.stack and order.index(site.path) < order.index(stack.stack)


def _parameters(module: nn.Module) -> Tensors:
    """Name -> tensor in master precision, without gradient."""
    with torch.no_grad():
        return {name: p.detach().to(master_dtype(p.dtype)) for name, p in module.named_parameters()}
