"""Scores of several tasks -> one score, so that a selection carries over to a task that none of them has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from smidgen.common.errors import DataError, RecipeError, nearest
from smidgen.planning.plans import Plan
from smidgen.planning.selection.budgets import choose
from smidgen.recipe.recipe import Narrowing

WAYS = ("union", "rank", "mean")
Scores = Mapping[str, Tensor]


def combine(
    model: nn.Module, plan: Plan, span: Narrowing, tasks: Sequence[Scores], how: str = "mean"
) -> dict[str, Tensor]:
    """One score of every value from those of several tasks; `choose` then meets the budget, so sizes stay equal.

    Args:
        span: which methods of the recipe are narrowed, and by which Select.
        tasks: for each task, saved name -> score of each value, in the tensor's shape.
        how: "mean": mean of the scores, each task's divided by their sum (of absolute values). "rank": mean rank.
            "union": how many tasks keep the value (with a minus for order="bottom"), ties by "mean": their union,
            trimmed to the budget from its rarest members up.

    Raises:
        RecipeError: no such way, or no tasks.
        DataError: tasks with scores of different tensors.
    """
    if how not in WAYS:
        raise RecipeError(f"combine: {how!r} is not one of {', '.join(WAYS)}{nearest(how, WAYS)}")
    if not tasks:
        raise RecipeError("combine: there are no scores to combine")
    shapes = [{name: score.shape for name, score in scores.items()} for scores in tasks]
    if any(other != shapes[0] for other in shapes):
        raise DataError("combine: the tasks have scores of different tensors: of other recipes or models")
    if how == "rank":
        return _mean([_ranks(scores) for scores in tasks])
    mean = _mean([_normalised(scores) for scores in tasks])
    if how == "mean":
        return mean
    top = max(float(score.abs().max()) for score in mean.values()) or 1.0
    total = {name: score / (4 * top) for name, score in mean.items()}  # less than 1 apart: decides ties only
    for scores in tasks:
        for name, index in choose(model, plan, span, scores).items():
            total[name].view(-1)[index] += -1 if getattr(span.by, "order", "top") == "bottom" else 1
    return total


def _mean(tasks: Sequence[Scores]) -> dict[str, Tensor]:
    return {name: torch.stack([scores[name] for scores in tasks]).mean(0) for name in tasks[0]}


def _normalised(scores: Scores) -> dict[str, Tensor]:
    whole = sum(float(score.double().abs().sum()) for score in scores.values()) or 1.0
    return {name: score.double() / whole for name, score in scores.items()}


def _ranks(scores: Scores) -> dict[str, Tensor]:
    flat = torch.cat([score.double().flatten() for score in scores.values()])
    ranks = torch.from_numpy(rankdata(flat.numpy())).split([score.numel() for score in scores.values()])
    return {name: rank.view(score.shape) for (name, score), rank in zip(scores.items(), ranks, strict=True)}
