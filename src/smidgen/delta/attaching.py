"""attach, detach and what lies between. The base comes back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from smidgen.common.errors import AttachError
from smidgen.common.module_modes import modes_kept, renew_caches
from smidgen.common.wrappers import bare
from smidgen.delta.arithmetic.sums import Sum
from smidgen.delta.compatibility import fitted
from smidgen.delta.delta import Delta
from smidgen.delta.fingerprint import verify as verify_base
from smidgen.delta.saved_selection import Selection
from smidgen.methods.base import renewed
from smidgen.planning.entry import INDICES, START
from smidgen.planning.plans import Plan
from smidgen.planning.resolution import resolve
from smidgen.planning.selection.data_free_scores import choose_ready
from smidgen.planning.selection.narrowing import narrow
from smidgen.ports.attachment_record import attachment, refuse_attached, trained_parameters
from smidgen.ports.placement import place, take_off
from smidgen.recipe.recipe import Recipe, Term
from smidgen.sites.site import module_at


def attach(
    model: nn.Module,
    what: str | Term | Recipe | Delta | Sum[Delta],
    *,
    pooling: str | None = None,
    seed: int = 0,
    selection: Selection | None = None,
    verify: bool = True,
) -> nn.Module:
    """Attach a recipe, or a trained delta, to a model in place; the model keeps its class and is returned.

    Everything but the recipe's tensors and the head is frozen; train or eval mode stays as it is.

    Args:
        model: any torch module; transformers models also get their head trained. One that came from `torch.compile`
            or stands in DataParallel is changed inside.
        what: a recipe or its spelling, or a Delta (which brings its own pooling), or a sum of deltas (`a + b`).
        pooling: "first", "mean" or "last" for a sequence classifier; None for the class's own.
        seed: for tensors that start at random; torch's global generator is left alone.
        selection: what to keep, for a recipe with Select; needed if its score needs data (see `smidgen.select`).
        verify: check the base's fingerprint (of a delta or a selection).

    Raises:
        AttachError: something is attached already, or a place cannot be edited.
        PlanError: the recipe does not fit the model.
        DeltaError: the delta belongs to another base or head.
    """
    refuse_attached(model)
    inside = bare(model)
    if isinstance(what, Sum):
        what = what.on(inside, verify=verify)
    if isinstance(what, Delta):
        if pooling is not None or selection is not None:
            raise AttachError("a delta brings its own pooling and selection; leave pooling= and selection= out")
        put(inside, fitted(inside, what, verify), what)
    else:
        place(inside, _narrowed(inside, resolve(inside, what, pooling), selection, seed, verify), seed)
        torch.compiler.reset()
    return model


def put(model: nn.Module, plan: Plan, delta: Delta) -> None:
    """Attach a delta whose plan is at hand; `attach` without a look at the base."""
    _put(bare(model), plan, delta)
    torch.compiler.reset()  # compiled code does not notice new hooks


def check_places(model: nn.Module, plan: Plan, delta: Delta) -> None:
    """Attach a delta and take it off. Nothing runs in between, so compiled code stays true.

    Raises:
        AttachError: a place cannot be edited; nothing is attached then.
    """
    _put(bare(model), plan, delta)
    take_off(bare(model))


def _put(model: nn.Module, plan: Plan, delta: Delta) -> None:
    place(model, plan, compute=False)
    fill_values(model, delta)


def detach(model: nn.Module) -> Delta:
    """Take off what is attached and give it back as a Delta; the model is as it was, bit for bit.

    Raises:
        AttachError: nothing is attached, or the model was changed while something was; it stays attached.
    """
    delta = Delta.of(model)
    remove(model)
    return delta


def remove(model: nn.Module) -> None:
    """Take off what is attached without keeping it."""
    take_off(bare(model))
    torch.compiler.reset()


@contextmanager
def attached(
    model: nn.Module,
    what: str | Term | Recipe | Delta | Sum[Delta],
    *,
    pooling: str | None = None,
    seed: int = 0,
    selection: Selection | None = None,
    verify: bool = True,
) -> Iterator[nn.Module]:
    """`attach` on entry, take off on exit, also after an error; a delta switches the model to eval mode inside.

    Nothing is given back: what was trained inside is lost, unless `Delta.of(model)` took a copy. Modes are restored.

    Args and errors: as in `attach`.
    """
    refuse_attached(model)
    what = what.on(model, verify=verify) if isinstance(what, Sum) else what
    with modes_kept(model):
        attach(model, what, pooling=pooling, seed=seed, selection=selection, verify=verify)
        if isinstance(what, Delta):
            model.eval()
        try:
            yield model
        finally:
            remove(model)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the base inside: edits off, parameters at their pretrained values, the pooling kept.

    Raises:
        AttachError: nothing is attached.
    """
    record, inside = attachment(model), bare(model)
    record.unplug(inside)
    try:
        yield model
    finally:
        record.plug(inside)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print numbers of trained, head and all values, and trained over pretrained in percent, as PEFT words it.

    Raises:
        AttachError: nothing is attached.
    """
    plan = attachment(model).plan
    everything = plan.pretrained + plan.head_values
    print(
        f"trainable params: {plan.trained:,} || head params: {plan.head_values:,} || "
        f"all params: {everything:,} || trainable%: {100 * plan.trained / plan.pretrained:.4f}"
    )


def _narrowed(model: nn.Module, plan: Plan, selection: Selection | None, seed: int, check: bool) -> Plan:
    """The plan with what a selection keeps: the one given, or one that needs no data."""
    if selection is not None and selection.recipe.whole != plan.recipe.whole:
        raise AttachError(f"the selection is of another recipe: {selection.recipe.whole}, not {plan.recipe.whole}")
    if selection is not None and not plan.pending:
        plan = resolve(model, selection.recipe, plan.pooling)
    if not plan.pending:
        return plan
    if selection is None:
        return narrow(plan, choose_ready(model, plan, seed))
    if check:
        verify_base(model, selection.base, (*(name for name, _ in plan.head), *renewed(plan.recipe, model)))
    return narrow(plan, selection.indices)


def fill_values(model: nn.Module, delta: Delta) -> None:
    """Copy a delta's values, and the starts that it brings, into what is attached."""
    model = bare(model)
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(delta.tensors[name])
        for name, tensor in attachment(model).fixed(model):
            if name.endswith(START):
                tensor.copy_(delta.tensors[name])
        for entry in attachment(model).plan.entries:
            for symbol, _ in entry.shared_indices:
                name = entry.name(symbol)
                indices: Tensor = getattr(module_at(model, name.rpartition(".")[0]), symbol)
                indices.copy_(delta.tensors[name + INDICES])
    renew_caches(model)
