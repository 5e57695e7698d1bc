"""Several changes of the same values -> one: weighted sum, TIES, DARE. Pure functions of float64 tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from smidgen.common.errors import DeltaError

Changes = Mapping[str, Tensor]
Rule = Callable[[Sequence[float], Sequence[Changes], Sequence[Changes]], dict[str, Tensor]]


def weighted(weights: Sequence[float], changes: Sequence[Changes]) -> dict[str, Tensor]:
    """sum_i w_i change_i, name by name. Each change: name -> (n,), the same names in all."""
    return {
        name: torch.stack([w * change[name] for w, change in zip(weights, changes, strict=True)]).sum(0)
        for name in changes[0]
    }


def total(weights: Sequence[float], changes: Sequence[Changes], trained: Sequence[Changes]) -> dict[str, Tensor]:
    """Task arithmetic, Ilharco et al. 2023, arXiv:2212.04089, section 2: the weighted sum."""
    return weighted(weights, changes)


def elected(density: float) -> Rule:
    """TIES, Yadav et al. 2023, TIES-Merging, arXiv:2306.01708, section 4: trim, elect, mean of those that agree.

    trim:   keep the round(density * n) largest of a change's n trained values by magnitude, over all its tensors
            (one at least; ties to what comes first); the rest is 0
    elect:  s = sign(sum_i w_i trimmed_i)
    merge:  mean, weighted by w, of those trimmed_i that are not 0 and have sign s; 0 where there is none
    """

    def rule(weights: Sequence[float], changes: Sequence[Changes], trained: Sequence[Changes]) -> dict[str, Tensor]:
        counts = [sum(int(mask.sum()) for mask in masks.values()) for masks in trained]
        shares = [max(1, round(density * count)) for count in counts]
        trimmed = [_trim(change, keep) for change, keep in zip(changes, shares, strict=True)]
        return {name: _elect(weights, [change[name] for change in trimmed]) for name in changes[0]}

    return rule


def _trim(change: Changes, keep: int) -> dict[str, Tensor]:
    flat = torch.cat(list(change.values()))
    largest = flat.abs().sort(descending=True, stable=True).indices[:keep]
    kept = torch.zeros_like(flat).index_copy(0, largest, flat[largest])
    return dict(zip(change, kept.split([len(values) for values in change.values()]), strict=True))


def _elect(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(values))  # (deltas, n)
    weight = torch.tensor(weights, dtype=stacked.dtype)[:, None]
    sign = (weight * stacked).sum(0).sign()
    agree = ((stacked.sign() == sign) & (stacked != 0)) * weight
    mass = agree.sum(0)
    return (agree * stacked).sum(0) / torch.where(mass > 0, mass, 1.0)


def dropped(density: float, seed: int) -> Rule:
    """DARE, Yu et al. 2024, Language Models are Super Mario, arXiv:2311.03099, section 3.2, and their weighted sum.

    Each value of a change stays with probability `density`, divided by it, or else is 0. What is drawn is a function of
    (seed, place of the delta, name of the tensor).
    """

    def rule(weights: Sequence[float], changes: Sequence[Changes], trained: Sequence[Changes]) -> dict[str, Tensor]:
        kept = [
            {name: values * drawn(len(values), density, seed, place, name) / density for name, values in change.items()}
            for place, change in enumerate(changes)
        ]
        return weighted(weights, kept)

    return rule


def drawn(count: int, density: float, seed: int, place: int, name: str) -> Tensor:
    """Which values of a tensor DARE keeps: (count,) bool. torch's global generator is left alone."""
    digest = hashlib.sha256(f"{seed}/{place}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64) < density


def normalised_weights(count: int, weights: Sequence[float] | None) -> list[float]:
    """Weights above 0, 1 each if none are given. Raises DeltaError, also if `count` is 0."""
    if not count:
        raise DeltaError("there are no deltas to combine")
    found = [1.0] * count if weights is None else [float(weight) for weight in weights]
    check_weights(found)
    if len(found) != count or min(found) <= 0:
        raise DeltaError(f"weights={found} must be {count} numbers above 0, one for each delta")
    return found


def check_weights(weights: Sequence[float]) -> None:
    """Raises DeltaError unless all are finite."""
    for weight in weights:
        if not math.isfinite(weight):
            raise DeltaError(f"the weight {weight} is not a finite number")


def check_density(density: float) -> None:
    """Raises DeltaError unless it is a share above 0."""
    if not 0 < density <= 1:
        raise DeltaError(f"density={density!r} must lie in (0, 1]: the share of values that stays")
