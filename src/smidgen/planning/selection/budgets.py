"""Scores and a budget -> indices. Budgets are met exactly; ties go to what comes first in the plan."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from smidgen.common.errors import DataError, PlanError
from smidgen.planning.entry import Entry
from smidgen.planning.plans import Plan
from smidgen.planning.selection.keyed_draws import uniform
from smidgen.planning.selection.select_term import SHUFFLED, Select
from smidgen.planning.selection.units import Candidate, candidates, check_heads, label_units
from smidgen.recipe.recipe import Narrowing


class SelectionWarning(UserWarning):
    """A selection had fewer values of a score above 0 than its budget, and was filled up with some of score 0."""


def entries_of(plan: Plan, span: Narrowing) -> list[Entry]:
    """The entries that a narrowing is about."""
    return [entry for entry in plan.entries if span.start <= entry.index < span.stop]


def check_choice(model: nn.Module, plan: Plan) -> None:
    """Raises PlanError, before any data is read, if a Select has nothing to choose from, or its units are not there."""
    for span in plan.recipe.narrowed:
        found = _found(plan, span)
        if isinstance(span.by, Select) and span.by.granularity == "head":
            check_heads(model, found)


def _found(plan: Plan, span: Narrowing) -> list[Candidate]:
    found = candidates(entries_of(plan, span))
    if not found:
        raise PlanError(f"{span.by} has nothing to choose from: what stands before it trains nothing but the head")
    return found


def choose(model: nn.Module, plan: Plan, span: Narrowing, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Saved name -> ascending indices (int64) of what is kept, for every tensor that the narrowing is about.

    Args:
        scores: saved name -> score of each value, in the tensor's shape.

    Raises:
        PlanError: nothing to choose from, a budget of more than there is, or units that the model does not have.
        DataError: a score that is missing, of another shape, or not finite.
    """
    by = span.by
    if not isinstance(by, Select):
        raise PlanError(f"{by} does not say how to choose")
    found = _found(plan, span)
    values = torch.cat([_checked_score(scores, c) for c in found])
    unit, count = label_units(model, found, by.granularity)
    score = values if by.granularity == "element" else _means(values, unit, count)
    group = _groups(found, unit, count, by.scope)
    kept = _best(-score if by.order == "bottom" else score, group, budget(by, count))
    if by.order != "bottom":
        _warn_of_zeros(by, score[kept])
    mask = torch.zeros(count, dtype=torch.bool)
    mask[kept] = True
    taken = mask if by.granularity == "element" else mask[unit.clamp(min=0)] & (unit >= 0)
    pieces = taken.split([c.size for c in found])
    if by.order == SHUFFLED:
        pieces = tuple(_drawn(piece, f"{by.seed}/{c.name}") for c, piece in zip(found, pieces, strict=True))
    return {c.name: piece.nonzero()[:, 0] for c, piece in zip(found, pieces, strict=True)}


def chance_overlap(model: nn.Module, plan: Plan, span: Narrowing) -> float:
    """Values that two random selections both keep, over values that one keeps: a ratio of expectations.

    Each unit of group g is kept with probability p_g, its group's share of the budget over its size; with n_g values
    in group g this is sum(p_g^2 n_g) / sum(p_g n_g), and keep / units where all units compete.

    Raises:
        PlanError: as `choose`.
    """
    by = span.by
    if not isinstance(by, Select):
        raise PlanError(f"{by} does not say how to choose")
    found = _found(plan, span)
    unit, count = label_units(model, found, by.granularity)
    group = _groups(found, unit, count, by.scope)
    sizes = torch.bincount(group)
    kept = torch.tensor(quotas(sizes.tolist(), budget(by, count)), dtype=torch.float64)
    share = (kept / sizes.clamp(min=1))[group]  # of each unit
    values = torch.bincount(unit[unit >= 0], minlength=count).double()
    return float((share.square() * values).sum() / (share * values).sum())


def budget(by: Select, count: int) -> int:
    """Units to keep, of `count`: at least 1. Raises PlanError if that is more than there are."""
    wanted = by.keep if isinstance(by.keep, int) else max(1, int(by.keep * count + 0.5))
    if wanted > count:
        raise PlanError(f"{by}: keep={wanted} is more than the {count:,} {by.granularity}s that there are")
    return wanted


def quotas(sizes: Sequence[int], total: int) -> list[int]:
    """Split a total over groups in proportion to their sizes, by largest remainder; none gets more than its size."""
    whole = sum(sizes)
    shares = [total * size / whole for size in sizes]
    given = [int(share) for share in shares]
    order = sorted(range(len(sizes)), key=lambda i: given[i] - shares[i])
    for i in order[: total - sum(given)]:
        given[i] += 1
    return given


def _checked_score(scores: Mapping[str, Tensor], c: Candidate) -> Tensor:
    """A candidate's score, (size,) float64 on the CPU; raises DataError if missing, of another shape or not finite."""
    if c.name not in scores:
        raise DataError(f"there is no score for {c.name}; the scores are those of another recipe")
    score = scores[c.name]
    if tuple(score.shape) != c.shape:
        raise DataError(f"the score of {c.name} has shape {tuple(score.shape)}, the tensor {c.shape}")
    if not torch.isfinite(score).all():
        raise DataError(f"the score of {c.name} is not finite")
    return score.detach().to("cpu", torch.float64).flatten()


def _means(values: Tensor, unit: Tensor, count: int) -> Tensor:
    inside = unit >= 0
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, unit[inside], values[inside])
    return total / torch.bincount(unit[inside], minlength=count)


def _groups(found: Sequence[Candidate], unit: Tensor, count: int, scope: str) -> Tensor:
    """Group of each unit: units compete within one."""
    if scope == "global":
        return torch.zeros(count, dtype=torch.long)
    keys = [c.name if scope == "tensor" else c.entry.term_kinds[c.term] for c in found]
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    each = torch.tensor([numbers[key] for key in keys]).repeat_interleave(torch.tensor([c.size for c in found]))
    group = torch.zeros(count, dtype=torch.long)
    group[unit] = each
    return group


def _best(score: Tensor, group: Tensor, total: int) -> Tensor:
    """Units with the best scores, each group with its share of the total."""
    sizes = torch.bincount(group).tolist()
    kept = []
    for number, quota in enumerate(quotas(sizes, total)):
        members = (group == number).nonzero()[:, 0]
        order = torch.sort(score[members], descending=True, stable=True).indices[:quota]
        kept.append(members[order])
    return torch.cat(kept)


def _drawn(kept: Tensor, key: str) -> Tensor:
    """A mask with as many of a tensor's values, at places drawn by a key."""
    found = torch.zeros_like(kept)
    found[uniform(key, len(kept)).topk(int(kept.sum())).indices] = True
    return found


def _warn_of_zeros(by: Select, kept: Tensor) -> None:
    zeros = int((kept == 0).sum())
    if zeros:
        warnings.warn(
            f"{by} kept {zeros:,} of {len(kept):,} {by.granularity}s whose score is 0, in the order of the plan: the "
            "loss does not depend on them at the start (LoRA's A while B is 0); give warmup= steps, or keep fewer",
            SelectionWarning,
            stacklevel=3,
        )
