"""Which trained results add up, and what the sum is a result of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from smidgen.common.errors import DeltaError
from smidgen.delta.arithmetic.merge_rules import Changes
from smidgen.delta.compatibility import Trained
from smidgen.methods.base import Method
from smidgen.methods.capabilities import Joins, Renews
from smidgen.planning.entry import INDICES, Entry
from smidgen.planning.plans import Plan
from smidgen.planning.selection.select_term import Select
from smidgen.recipe.recipe import Narrowing, Recipe, Term


def check_alike(deltas: Sequence[Trained]) -> None:
    """Raises DeltaError unless all belong to one base and have heads for the same labels."""
    first = deltas[0]
    for other in deltas[1:]:
        a, b = first.base, other.base
        same = (a.architecture, a.structure) == (b.architecture, b.structure)
        told = (a.dtype, a.algorithm) == (b.dtype, b.algorithm)  # else the base itself will tell
        if not same or (told and a.content != b.content):
            names = (f"{x.name or x.architecture!r} ({x.content[:8]})" for x in (a, b))
            raise DeltaError(f"these deltas belong to different bases, {' and '.join(names)}: train both on one")
        for what, x, y in (("labels", first.labels, other.labels), ("tensors", _head(first), _head(other))):
            if x != y:
                raise DeltaError(f"these deltas have different heads, with {what} {x} and {y}: only like heads combine")
        if first.pooling != other.pooling:
            raise DeltaError(f"these deltas read {first.pooling!r} and {other.pooling!r} pooling: train with one")


def _head(delta: Trained) -> dict[str, tuple[int, ...]]:
    return {name: tuple(delta.tensors[name].shape) for name in delta.head}


def check_tensors(plans: Sequence[Plan]) -> None:
    """Raises DeltaError unless the plans (before narrowing) train and add tensors of the same names."""
    first = plans[0]
    for other in plans[1:]:
        same = [type(term) for term in first.recipe] == [type(term) for term in other.recipe]
        spans = [[(span.start, span.stop) for span in plan.recipe.narrowed] for plan in (first, other)]
        if not same or spans[0] != spans[1] or _names(first) != _names(other):
            raise DeltaError(f"{first.recipe} and {other.recipe} train other tensors: only like recipes add up")


def _names(plan: Plan) -> list[tuple[int, str]]:
    return [(entry.index, entry.name(term)) for entry in plan.entries for term, _ in entry.terms]


def check_linear(plan: Plan, how: str) -> None:
    """Raises DeltaError, naming method and reason, unless what each entry does adds up.

    how: "sum", or a rule that looks at single values, for which a method's own sum is no help.
    """
    for entry in plan.entries:
        if isinstance(entry.method, Renews) and any(
            entry.method.renews(n) for n, _ in entry.names() if not entry.added
        ):
            raise DeltaError(
                f"{entry.method} saves tensors whole, wherever they started, so no change of them is known: leave out "
                "target= in training to add such deltas up"
            )
        if not entry.added:
            continue
        if plan.recipe.narrows(entry.index):
            raise DeltaError(
                f"a part of {entry.method} does not add up: sums of parts are for what is trained in place"
            )
        if not entry.method.linear and _joined([entry.method]) is None:
            raise DeltaError(
                f"{entry.method} does not add up: what it does is not linear in its tensors, and no method does the "
                "same as the sum; what is trained in place, IA3, SSF, LoFiT and LoRA add up"
            )
        if not entry.method.linear and how != "sum":
            raise DeltaError(
                f"{how} looks at single values, but what {entry.method} does is not linear in them; add or average"
            )
        if entry.method.linear and (other := _beside(entry, plan.entries)):
            raise DeltaError(
                f"{entry.method} and {other.method} both act at {entry.site.name}: their changes multiply, so no sum "
                "of such deltas is one; add up deltas of one of the two"
            )


def _beside(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """Another entry at the same module, or at a slice of it that overlaps."""
    for other in entries:
        apart = entry.site.part and other.site.part and entry.site.name != other.site.name
        if other is not entry and other.site.path == entry.site.path and not apart:
            return other
    return None


def starts_of(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Saved name -> (n,) float64, flat: where the base stands, of all that adds up value by value."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for entry in plan.entries:
        fresh = entry.method.init(entry.site) if entry.added and entry.method.linear else {}
        for term, _ in entry.terms:
            start = fresh.get(term) if entry.added else parameters[entry.name(term)]
            if start is not None:
                found[entry.name(term)] = start.detach().to("cpu", torch.float64).flatten()
    return found


def changes_of(plan: Plan, delta: Trained, starts: Changes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a delta changed, name -> (n,) float64, and where it could, name -> (n,) bool. The plan is narrowed."""
    changes = {name: torch.zeros_like(start) for name, start in starts.items()}
    trained = {name: torch.zeros(len(start), dtype=torch.bool) for name, start in starts.items()}
    for entry in plan.entries:
        for term, name, _ in entry.trained():
            if name in starts:
                subset = entry.subsets.get(term)
                at = torch.arange(len(starts[name])) if subset is None else subset.indices
                changes[name][at] = delta.tensors[name].double().flatten() - starts[name][at]
                trained[name][at] = True
    return changes, trained


def stored_tensors(plan: Plan, starts: Changes, change: Changes, kept: Changes, delta: Trained) -> dict[str, Tensor]:
    """start + change as a delta stores it: whole, or where only some values are kept, these and their indices."""
    dtype = next(iter(delta.tensors.values())).dtype
    tensors = {}
    for entry in plan.entries:
        for term, shape in entry.terms:
            name = entry.name(term)
            if name not in starts or not kept[name].any():
                continue
            values = (starts[name] + change[name]).to(dtype)
            tensors[name] = values.view(shape) if kept[name].all() else values[kept[name]]
            if not kept[name].all():
                tensors[name + INDICES] = kept[name].nonzero().flatten().to(torch.int32)
    return tensors


def join_ranks(plans: Sequence[Plan], weights: Sequence[float], deltas: Sequence[Trained]) -> dict[str, Tensor]:
    """The tensors of the methods that say themselves what a sum is (LoRA)."""
    tensors: dict[str, Tensor] = {}
    for entries in zip(*(plan.entries for plan in plans), strict=True):
        first: Entry = entries[0]
        if first.added and not first.method.linear:
            assert isinstance(first.method, Joins)  # or it would not add up
            parts = [
                {term: d.tensors[entry.name(term)].double() for term, _ in entry.terms}
                for entry, d in zip(entries, deltas, strict=True)
            ]
            found = first.method.join(weights, [entry.method for entry in entries], parts, first.site)
            dtype = deltas[0].tensors[first.name(first.terms[0][0])].dtype
            tensors |= {first.name(term): value.to(dtype).contiguous() for term, value in found.items()}
    return tensors


def sum_recipe(recipes: Sequence[Recipe], plan: Plan, kept: Changes, own: Changes) -> Recipe:
    """The recipe of a sum: methods joined where they say how; a Select that says how many values came together.

    Args:
        plan: the first delta's, before narrowing.
        kept, own: saved name of a tensor -> (n,) bool, which of its values are in the sum, and in the first delta.
    """
    terms = [_sum_term(methods) for methods in zip(*recipes, strict=True)]
    return Recipe(tuple(terms), tuple(_sum_span(span, plan, kept, own) for span in recipes[0].narrowed))


def _sum_term(terms: Sequence[Term]) -> Method:
    methods = cast("Sequence[Method]", terms)  # whatever adds up is one
    return _joined(methods) or methods[0]


def _joined(methods: Sequence[Method]) -> Method | None:
    first = methods[0]
    return first.joined(methods) if isinstance(first, Joins) else None


def _sum_span(span: Narrowing, plan: Plan, kept: Changes, own: Changes) -> Narrowing:
    entries = [entry for entry in plan.entries if span.start <= entry.index < span.stop]
    names = [entry.name(term) for entry in entries for term, _ in entry.terms]
    count, before = (sum(int(masks[name].sum()) for name in names) for masks in (kept, own))
    by = cast(Select, span.by)
    return span if count == before else replace(span, by=replace(by, keep=count, granularity="element", scope="global"))
