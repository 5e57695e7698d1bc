"""Attentions that take more keys and values than the text's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from smidgen.common.errors import PlanError
from smidgen.methods.base import Method
from smidgen.methods.capabilities import AddsKeys
from smidgen.planning.entry import Entry
from smidgen.planning.site_rules import Missed, SiteRules
from smidgen.sites.attention_modules import find_heads, interface_path, no_interface, without_keys
from smidgen.sites.site import AttentionSublayer, CrossAttentionSublayer, KeyValueSite, Site

INTERFACE = "computes without transformers' AttentionInterface, so no keys can be added"
HEADS = "how many heads it has is not known"


class KeyValueRules(SiteRules):
    """What goes through transformers' AttentionInterface."""

    sites = (KeyValueSite,)
    capabilities = (AddsKeys,)

    def find(self, model: nn.Module, found: Sequence[Site]) -> Sequence[Site]:
        """Those of known sublayers whose heads are known."""
        return find_heads(model, found)

    def unmatched(self, method: Method, model: nn.Module, sites: Sequence[Site]) -> str:
        """The classes that do not ask the interface."""
        if not (classes := no_interface(model, sites)):
            return ""
        return (
            f"; {', '.join(classes)} does not go through transformers' AttentionInterface, so no keys can be added: "
            "choose a method that adds none"
        )

    def refuse(self, method: Method, model: nn.Module, sites: Sequence[Site], entries: Sequence[Entry]) -> None:
        """Keys must not reach some of a text's attentions only: the others do not ask for any."""
        passed = [site for site in without_keys(model, sites) if method.acts(site)] if entries else []
        if passed:
            names = dict.fromkeys(type(model.get_submodule(s.path.rpartition(".")[0])).__name__ for s in passed)
            here, there = (", ".join(dict.fromkeys(s.stack for s in at)) for at in (passed, [r.site for r in entries]))
            raise PlanError(
                f"{method}: {', '.join(names)} in {here} does not go through transformers' AttentionInterface, so keys "
                f"would reach {there} alone; choose a method that adds none"
            )

    def missed(self, method: Method, model: nn.Module, sites: Sequence[Site]) -> Iterator[Missed]:
        """Known attentions that take no keys."""
        for site in sites:
            if not isinstance(site, AttentionSublayer | CrossAttentionSublayer) or not method.acts(keys_at(site)):
                continue
            asks = interface_path(model, site.entry)
            yield Missed(asks or site.entry.rpartition(".")[0], site, HEADS if asks else INTERFACE)


def keys_at(place: Site) -> KeyValueSite:
    """An attention that takes keys, in the place of a site."""
    return KeyValueSite.beside(place, heads=1, head_dim=2, value_dim=2)
