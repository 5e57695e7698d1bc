"""The parameter port: a trained copy stands in `module._parameters` under the base tensor's own name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from smidgen.common.dtypes import LOW, master_dtype
from smidgen.planning.plans import Plan
from smidgen.ports.in_place.master_weights import Low
from smidgen.sites.site import NormSite, module_at


@dataclass
class Swap:
    """One existing tensor with a master in its place, at every module that owns it."""

    name: str
    owners: tuple[str, ...]
    original: nn.Parameter
    master: nn.Parameter
    trained: bool = True
    read_dtype: torch.dtype = torch.float32  # in which its module reads it: that of the original, if it has no other


def swaps(
    plan: Plan,
    parameters: Mapping[str, nn.Parameter],
    owners: Mapping[int, list[str]],
    read: Mapping[str, torch.dtype],
) -> list[Swap]:
    """A master for each tensor that a plan trains whole, and for the terms of norms that stand beside one.

    Args:
        parameters: name -> parameter.
        owners: identity of a parameter -> all of its names.
        read: name -> dtype in which a module reads a parameter, where that is another than the parameter's.
    """
    names = [
        entry.name(t) for entry in plan.entries if not entry.added for t, _ in entry.terms if t not in entry.subsets
    ]
    trained = [*names, *(name for name, _ in plan.head)]
    # A norm in a low-precision base computes in float32 with both of its terms, even if one of them is frozen.
    norms = {
        f"{entry.site.path}.{term}": None
        for entry in plan.entries
        if isinstance(entry.site, NormSite) and not entry.added
        for term, _ in entry.site.terms
    }
    frozen = [name for name in norms if name not in trained and parameters[name].element_size() < 4]
    found = []
    for name in (*trained, *frozen):
        original = parameters[name]
        master = nn.Parameter(
            original.detach().to(master_dtype(original.dtype), copy=True), requires_grad=name in trained
        )
        dtype = read.get(name, original.dtype)
        found.append(Swap(name, tuple(owners[id(original)]), original, master, name in trained, dtype))
    return found


def plug_in(model: nn.Module, swaps: Sequence[Swap]) -> None:
    """Put the masters in."""
    for swap in swaps:
        _set(model, swap, swap.master)


def take_back(model: nn.Module, swaps: Sequence[Swap]) -> None:
    """Put the very original Parameters back, moved to where the module now lives."""
    for swap in swaps:
        if swap.original.device != swap.master.device:
            swap.original.data = swap.original.data.to(swap.master.device)
        _set(model, swap, swap.original)


def low_modules(plan: Plan, swaps: Sequence[Swap]) -> list[Low]:
    """Modules of a low-precision base that hold masters."""
    norms = {entry.site.path for entry in plan.entries if isinstance(entry.site, NormSite)}
    terms: dict[str, dict[str, torch.dtype]] = {}
    for swap in swaps:
        if swap.read_dtype in LOW:
            for owner in swap.owners:
                path, _, term = owner.rpartition(".")
                terms.setdefault(path, {})[term] = swap.read_dtype
    return [(path, stored, path in norms) for path, stored in terms.items()]


def _set(model: nn.Module, swap: Swap, parameter: nn.Parameter) -> None:
    for owner in swap.owners:
        path, _, term = owner.rpartition(".")
        module_at(model, path)._parameters[term] = parameter
