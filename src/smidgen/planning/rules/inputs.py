"""The embedding of a text's tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from smidgen.common.errors import PlanError
from smidgen.methods.base import Method
from smidgen.methods.capabilities import AddsTokens, Tensors
from smidgen.planning.entry import Entry
from smidgen.planning.prompt_positions import prompt_length
from smidgen.planning.site_rules import SiteRules
from smidgen.sites.input_embedding import find_input, position_limit
from smidgen.sites.site import InputSite, Site
from smidgen.sites.weight_view import parameters_of, seen_from


class InputRules(SiteRules):
    """Where vectors can stand among a text's."""

    sites = (InputSite,)
    capabilities = (AddsTokens,)

    def find(self, model: nn.Module, found: Sequence[Site]) -> Sequence[Site]:
        """The one place, in a model that embeds the tokens of one text."""
        return find_input(model)

    def base_tensors(self, model: nn.Module, site: Site) -> Tensors:
        """ "weight", the table."""
        return seen_from(site, *parameters_of(model.get_submodule(site.path)))

    def unmatched(self, method: Method, model: nn.Module, sites: Sequence[Site]) -> str:
        """That there is no such place."""
        return "; it does not embed the tokens of one text, so none can be added"

    def refuse_together(self, model: nn.Module, entries: Sequence[Entry]) -> None:
        """A prompt, or several, must not take all positions that a model has."""
        prompts = [(entry, entry.site) for entry in entries if isinstance(entry.site, InputSite)]
        limit = position_limit(model, prompts[0][1]) if prompts else None
        taken = sum(prompt_length(entry.method, site) for entry, site in prompts)
        if limit is not None and taken >= limit:
            raise PlanError(
                f"{' and '.join(str(entry.method) for entry, _ in prompts)}: the model has {limit} positions, so "
                f"{taken} vectors leave none for a text; a shorter prompt fits"
            )
