"""Scores that need no data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from smidgen.errors import PlanError
from smidgen.plan import Plan
from smidgen.recipe import Narrowing
from smidgen.selection.budget import choose, rows_of
from smidgen.selection.term import Select
from smidgen.start import initial


def magnitude(start: Tensor, name: str, seed: int) -> Tensor:
    """|theta_0|."""
    return start.detach().abs()


def random(start: Tensor, name: str, seed: int) -> Tensor:
    """Uniform in [0, 1), a function of (seed, name)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(start.shape, dtype=torch.float64, generator=generator)


READY = {"magnitude": magnitude, "random": random}


def starts(model: nn.Module, plan: Plan, span: Narrowing, seed: int) -> dict[str, Tensor]:
    """Saved name -> what the tensor starts at, for everything that a narrowing is about."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for row in rows_of(plan, span):
        fresh: Mapping[str, Tensor] = initial(row, seed, model) if row.added else {}
        found |= {row.name(t): fresh[t] if row.added else parameters[row.name(t)] for t, _ in row.terms}
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
        start = starts(model, plan, span, seed)
        scores = {name: READY[by.score](tensor, name, by.seed) for name, tensor in start.items()}
        indices |= choose(model, plan, span, scores)
    return indices
