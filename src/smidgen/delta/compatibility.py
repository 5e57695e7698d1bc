"""A trained result against a model: the right base, and every tensor in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from torch import Tensor, nn

from smidgen.common.errors import DeltaError
from smidgen.common.finite_values import not_finite
from smidgen.common.wrappers import bare
from smidgen.delta.fingerprint import Fingerprint
from smidgen.delta.fingerprint import verify as verify_base
from smidgen.methods.base import renewed
from smidgen.methods.capabilities import Grows
from smidgen.planning.plans import Plan
from smidgen.planning.resolution import resolve
from smidgen.planning.selection.kept_shapes import chosen_indices
from smidgen.planning.selection.narrowing import narrow
from smidgen.recipe.recipe import Recipe
from smidgen.sites.task_head import head_names


class Trained(Protocol):
    """What a trained result has; `Delta` says what each field is."""

    @property
    def recipe(self) -> Recipe:
        """What was trained."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Saved name -> tensor."""

    @property
    def base(self) -> Fingerprint:
        """Fingerprint of the base."""

    @property
    def head(self) -> tuple[str, ...]:
        """Names of the head's tensors."""

    @property
    def pooling(self) -> str | None:
        """None for the class's own."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names in id order."""

    @property
    def info(self) -> Mapping[str, object]:
        """Plain data."""


def fitted(model: nn.Module, delta: Trained, verify: bool = True) -> Plan:
    """The plan of a delta's recipe on a model, narrowed as the delta's indices say.

    Raises:
        DeltaError: another base (with `verify`), a tensor that is missing, unexpected or of another shape, or a value
            that is not finite.
    """
    check_values(model, delta, verify)
    model = bare(model)
    # the base is the one of the training, so its head is what was head there
    head = delta.head if verify else {*delta.head, *head_names(model)}
    plan = resolve(model, delta.recipe, delta.pooling, head)
    if plan.pending:
        plan = narrow(plan, chosen_indices(plan, delta.tensors))
    plan = _grown(plan, delta.tensors)
    shapes, found = plan.saved, {name: tuple(t.shape) for name, t in delta.tensors.items()}
    if set(shapes) != set(found):
        missing, extra = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
        raise DeltaError(f"the delta does not fit {plan.model}: missing {missing[:3]}, unexpected {extra[:3]}")
    wrong = [name for name in shapes if shapes[name] != found[name]]
    if wrong:
        name = wrong[0]
        hint = "; load the model with smidgen.load(name, delta=delta)" if name in delta.head else ""
        raise DeltaError(f"{name} has shape {shapes[name]} in {plan.model} but {found[name]} in the delta{hint}")
    return plan


def check_values(model: nn.Module, delta: Trained, verify: bool = True) -> None:
    """Raises DeltaError if a value of a delta is not finite or (with `verify`) a model is not its base."""
    if broken := not_finite(delta.tensors):
        raise DeltaError(
            f"the delta is not attached: {broken}; its training diverged, train again with a lower learning rate"
        )
    if verify:
        verify_base(bare(model), delta.base, head_held(bare(model), delta))


def head_held(model: nn.Module, delta: Trained) -> tuple[str, ...]:
    """Names of the model's parameters that a delta brings whole, whatever the base has there: the head and others."""
    return (*delta.head, *renewed(delta.recipe, model))


def _grown(plan: Plan, tensors: Mapping[str, Tensor]) -> Plan:
    """The plan with the shapes that events can have led to, where the tensors have such."""
    entries = []
    for entry in plan.entries:
        if (
            entry.added
            and isinstance(entry.method, Grows)
            and all(entry.name(term) in tensors for term, _ in entry.terms)
        ):
            shapes = {term: tuple(tensors[entry.name(term)].shape) for term, _ in entry.terms}
            if shapes != dict(entry.terms) and entry.method.grown(shapes, entry.site):
                entry = replace(entry, terms=tuple(shapes.items()), grown=True)
        entries.append(entry)
    return replace(plan, entries=tuple(entries))
