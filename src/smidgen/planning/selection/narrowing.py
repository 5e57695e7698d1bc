"""A plan with a selection: entries keep what was chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from smidgen.common.errors import DeltaError
from smidgen.methods.capabilities import StartsFromBase
from smidgen.planning.entry import Entry, Subset
from smidgen.planning.initial_values import initial
from smidgen.planning.plans import Plan
from smidgen.planning.selection.budgets import check_choice
from smidgen.planning.selection.data_free_scores import choose_ready, needs_data
from smidgen.planning.selection.kept_shapes import narrowed_shapes


def narrow(plan: Plan, indices: Mapping[str, Tensor]) -> Plan:
    """The plan with only the chosen values trained; `indices` has an entry (k,) for each tensor that was narrowed.

    A tensor that is kept in whole needs no indices. Of an existing module nothing else changes; an added one with
    nothing chosen is left out, and where some is chosen the rest of it stands at its start.

    Raises:
        DeltaError: indices that are none of this plan's tensors, or outside of one.
    """
    known = set(narrowed_shapes(plan))
    if known != set(indices):
        odd = sorted(known ^ set(indices))
        raise DeltaError(f"the selection is of another model or recipe: {plan.recipe.whole} differs in {odd[0]}")
    entries: list[Entry] = []
    for entry in plan.entries:
        entries += _narrowed(entry, indices) if plan.recipe.narrows(entry.index) else [entry]
    return replace(plan, entries=tuple(entries), chosen=True)


def settle(model: nn.Module, plan: Plan, seed: int = 0) -> Plan:
    """The plan as it will be attached, if that can be told without data; else as it is, `pending`."""
    if plan.pending:
        check_choice(model, plan)
    empty = any(parameter.is_meta for parameter in model.parameters())
    if not plan.pending or needs_data(plan) or empty:
        return plan
    return narrow(plan, choose_ready(model, plan, seed))


def _narrowed(entry: Entry, indices: Mapping[str, Tensor]) -> Iterator[Entry]:
    chosen = {term: _checked(indices[entry.name(term)], entry.name(term), prod(shape)) for term, shape in entry.terms}
    if not entry.sites and not any(len(index) for index in chosen.values()):
        return  # (sites that share tensors need each other)
    kept = tuple((t, s) for t, s in entry.terms if entry.added or len(chosen[t]))
    partial = [(t, s) for t, s in kept if len(chosen[t]) < prod(s)]
    fresh = initial(entry, 0) if entry.added and partial else {}
    drawn = isinstance(entry.method, StartsFromBase) and not entry.owns_shared
    subsets = {t: Subset(chosen[t], s, t in fresh and (drawn or not _constant(fresh[t]))) for t, s in partial}
    yield replace(entry, terms=kept, subsets=subsets)


def _checked(index: Tensor, name: str, size: int) -> Tensor:
    """Indices (k,) as int64 on the CPU; raises DeltaError unless they ascend within a tensor of `size` values."""
    whole = not index.is_floating_point() and index.dtype != torch.bool
    index = index.detach().to("cpu", torch.long)
    good = (
        whole
        and index.ndim == 1
        and (not len(index) or (index[0] >= 0 and index[-1] < size and bool((index.diff() > 0).all())))
    )
    if not good:
        raise DeltaError(
            f"the indices of {name} are not ascending numbers below {size:,}: damaged, or of another model"
        )
    return index


def _constant(tensor: Tensor) -> bool:
    """Whether a start need not be saved: all its values are the same number, so it was not drawn at random."""
    return tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all())
