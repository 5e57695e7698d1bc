"""Which values of a plan a selection keeps, and the shapes that result."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from smidgen.planning.entry import INDICES, Shape
from smidgen.planning.plans import Plan


def narrowed_shapes(plan: Plan) -> dict[str, Shape]:
    """Saved name -> whole shape of every tensor that a plan's recipe narrows; the plan is not narrowed yet."""
    entries = [entry for entry in plan.entries if plan.recipe.narrows(entry.index)]
    return {entry.name(term): shape for entry in entries for term, shape in entry.terms}


def chosen_indices(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The selection that a delta carries: indices, all of a tensor that is there whole, none of an absent one."""
    found = {}
    for name, shape in narrowed_shapes(plan).items():
        index = tensors.get(name + INDICES)
        if index is None:
            index = torch.arange(prod(shape) if name in tensors else 0)
        found[name] = index.long() if index.dtype == torch.int32 else index  # anything else is refused by `narrow`
    return found
