"""How long a text may be beside a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from smidgen.data.processor import Processor
from smidgen.methods.capabilities import AddsTokens
from smidgen.planning.prompt_positions import prompt_length
from smidgen.planning.resolution import resolve
from smidgen.ports.attachment_record import refuse_attached
from smidgen.ports.prompts.prompt_port import check_positions_left
from smidgen.recipe.recipe import Recipe
from smidgen.sites.input_embedding import position_limit
from smidgen.sites.site import InputSite


def position_budget(model: nn.Module, recipe: Recipe) -> tuple[int | None, int]:
    """Positions that the model has, None where they do not end, and how many of them the recipe's prompts take.

    Raises:
        AttachError: something is attached to the model.
        PlanError: a recipe with a prompt does not fit the model.
    """
    if not any(isinstance(method, AddsTokens) for method in recipe):
        return None, 0
    refuse_attached(model)
    entries = [
        (entry.method, entry.site) for entry in resolve(model, recipe).entries if isinstance(entry.site, InputSite)
    ]
    return position_limit(model, entries[0][1]), sum(prompt_length(method, site) for method, site in entries)


def longest(model: nn.Module, recipe: Recipe, processor: Processor) -> int | None:
    """Most tokens of a text when nobody says: None for the processor's own limit, less where a prompt needs room."""
    limit, taken = position_budget(model, recipe)
    return None if limit is None else min(getattr(processor, "model_max_length", 512), 512, limit - taken)


def check_lengths(model: nn.Module, recipe: Recipe, lengths: Sequence[int]) -> None:
    """Raises AttachError, before anything is trained, if a text is too long to stand beside the recipe's prompts."""
    limit, taken = position_budget(model, recipe)
    check_positions_left(limit, taken, max(lengths, default=0))
