"""Learning rates to try for a recipe where none are named."""

from __future__ import annotations

import math
from statistics import fmean

from smidgen.common.errors import TrainError
from smidgen.methods.base import Method
from smidgen.recipe.recipe import Recipe
from smidgen.steps.optimizer_groups import HEAD_LR

SPAN = 10.0  # rates reach from a tenth of a recipe's own to ten times it


def rates_around(recipe: Recipe, rate: str, count: int) -> list[float]:
    """`count` rates, three digits each, log-spaced around the geometric mean of the methods' own.

    Args:
        rate: the setting that they are for: "lr", or "head_lr" for a recipe that trains the head alone.

    Raises:
        TrainError: no rate is asked for.
    """
    if count < 1:
        raise TrainError(f"trials={count} must be at least 1")
    own = [HEAD_LR] if rate == "head_lr" else [method.lr for method in recipe if isinstance(method, Method)]
    centre = fmean(map(math.log10, own))
    places = [2 * i / (count - 1) - 1 for i in range(count)] if count > 1 else [0.0]
    return [float(f"{10 ** (centre + place * math.log10(SPAN)):.3g}") for place in places]
