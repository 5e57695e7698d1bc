"""Scores that need no data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.common.errors import PlanError
from smidgen.planning.initial_values import initial
from smidgen.planning.plans import Plan
from smidgen.planning.selection.budgets import choose, entries_of
from smidgen.planning.selection.keyed_draws import uniform
from smidgen.planning.selection.select_term import Select
from smidgen.planning.selection.units import candidates, label_units
from smidgen.recipe.recipe import Narrowing

Scores = dict[str, Tensor]


def magnitude(model: nn.Module, plan: Plan, span: Narrowing, seed: int) -> Scores:
    """|theta_0|, of what starts at random by `seed`."""
    return {name: tensor.detach().abs() for name, tensor in starts(model, plan, span, seed).items()}


def random(model: nn.Module, plan: Plan, span: Narrowing, seed: int) -> Scores:
    """Uniform in [0, 1), one draw for each unit: the mean of a draw for each value would lie the nearer to a half the
    larger the unit is, and neither the best nor the worst units would be large ones."""
    by: Any = span.by
    found = candidates(entries_of(plan, span))
    if by.granularity == "element":
        return {c.name: uniform(f"{by.seed}/{c.name}", *c.shape) for c in found}
    unit, count = label_units(model, found, by.granularity)
    draws = uniform(f"{by.seed}/{by.granularity}", count)
    values = torch.where(unit < 0, 0.0, draws[unit.clamp(min=0)]).split([c.size for c in found])
    return {c.name: part.view(c.shape) for c, part in zip(found, values, strict=True)}


# score -> function(model, plan, span, seed of starts) -> saved name -> score of each value
READY = {"magnitude": magnitude, "random": random}


def starts(model: nn.Module, plan: Plan, span: Narrowing, seed: int) -> dict[str, Tensor]:
    """Saved name -> what the tensor starts at, for everything that a narrowing is about."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for entry in entries_of(plan, span):
        fresh: Mapping[str, Tensor] = initial(entry, seed, model) if entry.added else {}
        found |= {entry.name(t): fresh[t] if entry.added else parameters[entry.name(t)] for t, _ in entry.terms}
    return found


def needs_data(plan: Plan) -> bool:
    """Whether a plan's selections are computed from examples."""
    return any(not isinstance(span.by, Select) or span.by.needs_data for span in plan.recipe.narrowed)


def choose_ready(model: nn.Module, plan: Plan, seed: int) -> dict[str, Tensor]:
    """Indices for a recipe whose scores need no data. Raises PlanError, saying what to call, if one does."""
    indices: dict[str, Tensor] = {}
    for span in plan.recipe.narrowed:
        by = span.by
        if not isinstance(by, Select) or by.needs_data:
            raise PlanError(
                f"{by} needs data to choose: use fit, or attach(model, recipe, selection=smidgen.select(model, recipe, "
                "task))"
            )
        indices |= choose(model, plan, span, READY[by.score](model, plan, span, seed))
    return indices
