"""Delta arithmetic: sums, averages, TIES and DARE of what was trained on one base.

All of it is on changes from the base (trained value minus base value), which a delta does not hold: operators make a
`Sum`, which is a delta once it is put `on` the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from smidgen.common.errors import AttachError, DeltaError, RecipeError
from smidgen.common.wrappers import bare, check_model
from smidgen.delta.arithmetic.merge_rules import (
    Rule,
    check_density,
    check_weights,
    dropped,
    elected,
    normalised_weights,
    total,
    weighted,
)
from smidgen.delta.arithmetic.summable import (
    changes_of,
    check_alike,
    check_linear,
    check_tensors,
    join_ranks,
    starts_of,
    stored_tensors,
    sum_recipe,
)
from smidgen.delta.compatibility import Trained, fitted
from smidgen.planning.resolution import resolve
from smidgen.ports.attachment_record import is_attached

D = TypeVar("D", bound=Trained)


class Operand:
    """What stands in a sum: `a + b`, `a - b`, `-a`, `0.5 * a`, `a / 2` make a `Sum`."""

    def __add__(self: D, other: D | Sum[D]) -> Sum[D]:
        return Sum(((1.0, self),)) + other

    def __sub__(self: D, other: D | Sum[D]) -> Sum[D]:
        return Sum(((1.0, self),)) - other

    def __mul__(self: D, weight: float) -> Sum[D]:
        return Sum(((1.0, self),)) * weight

    def __rmul__(self: D, weight: float) -> Sum[D]:
        return Sum(((1.0, self),)) * weight

    def __truediv__(self: D, weight: float) -> Sum[D]:
        return Sum(((1.0, self),)) / weight

    def __neg__(self: D) -> Sum[D]:
        return Sum(((-1.0, self),))


@dataclass(frozen=True, eq=False)
class Sum(Generic[D]):
    """Deltas and their weights, added up when a base is given: `(a + 0.5 * b).on(model)`, `attach(model, a + b)`.

    Attributes:
        terms: (weight, delta), each delta once: in `(a + b) - b` b has the weight 0 and plays no part.
    """

    terms: tuple[tuple[float, D], ...]

    def __add__(self, other: D | Sum[D]) -> Sum[D]:
        if not isinstance(other, Operand | Sum):
            return NotImplemented
        more = other.terms if isinstance(other, Sum) else ((1.0, cast(D, other)),)
        deltas = {id(delta): delta for _, delta in (*self.terms, *more)}
        weights = dict.fromkeys(deltas, 0.0)
        for weight, delta in (*self.terms, *more):
            weights[id(delta)] += weight
        return Sum(tuple((weights[key], delta) for key, delta in deltas.items()))

    def __sub__(self, other: D | Sum[D]) -> Sum[D]:
        return self + -other if isinstance(other, Operand | Sum) else NotImplemented

    def __mul__(self, weight: float) -> Sum[D]:
        if not isinstance(weight, Real):
            return NotImplemented
        check_weights([weight])
        return Sum(tuple((weight * w, delta) for w, delta in self.terms))

    __rmul__ = __mul__

    def __truediv__(self, weight: float) -> Sum[D]:
        if not isinstance(weight, Real):
            return NotImplemented
        if weight == 0:
            raise DeltaError("a delta divided by 0; weights are finite numbers")
        found: Sum[D] = self * (1 / weight)
        return found

    def __neg__(self) -> Sum[D]:
        return self * -1.0

    def on(self, model: nn.Module, *, head: str = "first", verify: bool = True) -> D:
        """The sum as a delta of `model`, the untouched base: base + sum of weight * (trained - base).

        LoRA's are joined by rank, which is exact. Subsets give the union of their values.

        Args:
            head: "first": that of the first delta, not scaled; "average": the mean, with the weights.
            verify: check the base's fingerprint.

        Raises:
            DeltaError: other bases, tensors or heads, or a method of which a sum is none of its results.
            AttachError: something is attached to the model.
        """
        terms = [(w, delta) for w, delta in self.terms if w != 0] or list(self.terms[:1])
        return _combined(terms, model, total, {"how": "sum"}, head, verify)

    def __repr__(self) -> str:
        return "Sum(" + " + ".join(f"{weight:g} * {delta!r}" for weight, delta in self.terms) + ")"


def average(deltas: Sequence[D], weights: Sequence[float] | None = None, *, model: nn.Module, head: str = "first") -> D:
    """The mean of deltas, weighted by `weights` over their sum (default: all the same).

    Args:
        model, head: as in `Sum.on`.

    Raises:
        DeltaError: as in `Sum.on`, or weights that are not above 0, or not one for each delta.
    """
    found = normalised_weights(len(deltas), weights)
    whole = sum(found)
    terms = [(share / whole, delta) for share, delta in zip(found, deltas, strict=True)]
    return _combined(terms, model, total, {"how": "average"}, head)


def ties(
    deltas: Sequence[D],
    density: float = 0.2,
    weights: Sequence[float] | None = None,
    *,
    model: nn.Module,
    head: str = "first",
) -> D:
    """TIES (Yadav et al. 2023, arXiv:2306.01708, section 4): trim each change, elect signs, mean of those that agree.

    Of each delta the `density` largest share of the values that it trains is kept, head apart. `0.5 * ties(...)` gives
    the paper's scale (lambda).

    Args:
        density: in (0, 1].
        weights: of the deltas, above 0, in the election and in the mean; default: 1.
        model, head: as in `Sum.on`.

    Raises:
        DeltaError: as in `average`; and of LoRA, whose product is not linear in single values.
    """
    check_density(density)
    terms = list(zip(normalised_weights(len(deltas), weights), deltas, strict=True))
    return _combined(terms, model, elected(density), {"how": "TIES", "density": density}, head)


def dare(
    deltas: Sequence[D],
    density: float = 0.1,
    weights: Sequence[float] | None = None,
    *,
    seed: int = 0,
    model: nn.Module,
    head: str = "first",
) -> D:
    """DARE (Yu et al. 2024, arXiv:2311.03099, section 3.2): drop changes at random, rescale the rest, add them up.

    Args:
        density: probability that a value's change stays, in (0, 1]; what stays is divided by it.
        weights: of the deltas in the sum, above 0; default: 1.
        seed: of what is dropped.
        model, head: as in `Sum.on`.

    Raises:
        DeltaError: as in `ties`.
    """
    check_density(density)
    terms = list(zip(normalised_weights(len(deltas), weights), deltas, strict=True))
    return _combined(terms, model, dropped(density, seed), {"how": "DARE", "density": density, "seed": seed}, head)


def _combined(
    terms: Sequence[tuple[float, D]],
    model: nn.Module,
    rule: Rule,
    how: Mapping[str, str | float],
    head: str,
    verify: bool = True,
) -> D:
    """The delta whose merged weights are those of a weighted rule over the deltas; `how` goes into its record."""
    weights, deltas = [weight for weight, _ in terms], [delta for _, delta in terms]
    first: Any = deltas[0]  # a dataclass
    model = bare(model)
    check_model(model)
    if is_attached(model):
        raise AttachError("arithmetic needs the untouched base; detach what is attached first")
    if head not in ("first", "average"):
        raise DeltaError(f"head={head!r} is neither 'first' nor 'average'")
    check_alike(deltas)
    seen = [any(delta.base == other.base for other in deltas[:i]) for i, delta in enumerate(deltas)]
    plans = [fitted(model, d, verify and not known) for d, known in zip(deltas, seen, strict=True)]
    made = {**how, "head": head, "of": [_said(weight, delta) for weight, delta in terms]}
    info = {key: first.info[key] for key in ("model_class", "task") if key in first.info} | {"combined": made}
    if "max_length" in first.info.get("settings", {}):
        info["settings"] = {"max_length": first.info["settings"]["max_length"]}
    if rule is total and weights == [1.0]:
        return cast(D, replace(first, info=info))  # bit for bit, and whatever the method
    wholes = [resolve(model, delta.recipe, delta.pooling, delta.head) for delta in deltas]
    check_tensors(wholes)
    check_linear(wholes[0], "sum" if rule is total else str(how["how"]))
    starts = starts_of(model, wholes[0])
    changes, trained = zip(*(changes_of(plan, d, starts) for plan, d in zip(plans, deltas, strict=True)), strict=True)
    kept = {name: torch.stack([masks[name] for masks in trained]).any(0) for name in starts}
    recipe = sum_recipe([delta.recipe for delta in deltas], wholes[0], kept, trained[0])
    tensors = stored_tensors(wholes[0], starts, rule(weights, changes, trained) if starts else {}, kept, first)
    tensors |= join_ranks(wholes, weights, deltas) | _head(weights, deltas, head)
    result = replace(first, recipe=recipe, tensors=tensors, info=info)
    _check_fits(model, result)
    return cast(D, result)


def _head(weights: Sequence[float], deltas: Sequence[Trained], how: str) -> dict[str, Tensor]:
    first = {name: deltas[0].tensors[name] for name in deltas[0].head}
    if how == "first" or not first:
        return first
    if min(weights) <= 0:
        raise DeltaError("head='average' is a mean with the weights of the deltas, which must be above 0")
    heads = [{name: delta.tensors[name].double() for name in first} for delta in deltas]
    found = weighted([weight / sum(weights) for weight in weights], heads)
    return {name: found[name].to(value.dtype) for name, value in first.items()}


def _check_fits(model: nn.Module, result: Trained) -> None:
    try:
        fitted(model, result, verify=False)
    except RecipeError as error:
        raise DeltaError(f"the sum would be {result.recipe}, which is no recipe for this model: {error}") from None


def _said(weight: float, delta: Trained) -> dict[str, object]:
    return {"weight": weight, "recipe": str(delta.recipe), "info": dict(delta.info)}
