"""attach, detach and what lies between. The base comes back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from smidgen.attachment import Attachment, Swap, attachment, check_masters, is_attached, trained_parameters
from smidgen.delta import Delta
from smidgen.errors import AttachError, DeltaError
from smidgen.fingerprint import base_dtype, verify
from smidgen.heads import place_pooling
from smidgen.plan import Plan, resolve
from smidgen.ports import Edit, add_edit, check_editable, drop_casts, drop_edits, master_dtype, place_casts
from smidgen.recipe import Recipe, Term

SAVE_ERROR = (
    "save_pretrained on an attached model would lose the trained values on reload. Save the delta with "
    "smidgen.Delta.of(model).save(folder), or save a plain model with smidgen.merge(model).save_pretrained(folder); "
    "under Trainer, add smidgen.TrainerCallback()"
)


def attach(
    model: nn.Module,
    what: str | Term | Recipe | Delta,
    *,
    pooling: str | None = None,
    seed: int = 0,
    verify: bool = True,
) -> nn.Module:
    """Attach a recipe, or a trained delta, to a model in place; the model keeps its class and is returned.

    Everything but the recipe's tensors and the head is frozen; train or eval mode stays as it is.

    Args:
        model: any torch module; transformers models also get their head trained.
        what: a recipe or its spelling, or a Delta (which brings its own pooling).
        pooling: "first", "mean" or "last" for a sequence classifier; None for the class's own.
        seed: for tensors that start at random; torch's global generator is left alone.
        verify: check the base's fingerprint (deltas only).

    Raises:
        AttachError: something is attached already, or a place cannot be edited.
        PlanError: the recipe does not fit the model.
        DeltaError: the delta belongs to another base or head.
    """
    if is_attached(model):
        raise AttachError(f"{attachment(model).plan.recipe} is attached already; detach it first")
    plan = _fit_delta(model, what, verify) if isinstance(what, Delta) else resolve(model, what, pooling)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        place(model, plan)
    if isinstance(what, Delta):
        with torch.no_grad():
            for name, parameter in trained_parameters(model).items():
                parameter.copy_(what.tensors[name])
    torch.compiler.reset()  # compiled code does not notice new hooks
    return model


def detach(model: nn.Module) -> Delta:
    """Take off what is attached and give it back as a Delta; the model is as it was, bit for bit."""
    delta = Delta.of(model)
    remove(model)
    return delta


def remove(model: nn.Module) -> None:
    """Take off what is attached without keeping it."""
    record = attachment(model)
    record.unplug(model)
    for path in {path for path, _ in record.edits}:
        drop_edits(model.get_submodule(path))
    for path, _, _ in record.low_modules():
        drop_casts(model.get_submodule(path))
    for handle in record.handles:
        handle.remove()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, flag in record.flags.items():
        parameters[name].requires_grad_(flag)
    model.__dict__.pop("save_pretrained", None)
    model.__dict__.pop("_smidgen")
    torch.compiler.reset()


@contextmanager
def attached(model: nn.Module, what: str | Term | Recipe | Delta, **options: Any) -> Iterator[nn.Module]:
    """`attach` on entry, take off on exit, also after an error; a delta switches the model to eval mode inside."""
    training = {module: module.training for module in model.modules()}
    attach(model, what, **options)
    if isinstance(what, Delta):
        model.eval()
    try:
        yield model
    finally:
        remove(model)
        for module, mode in training.items():
            module.training = mode


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the base inside: edits and masters off, pooling kept; gives an Objective its reference outputs."""
    record = attachment(model)
    record.unplug(model)
    try:
        yield model
    finally:
        record.plug(model)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print the counts in the wording that PEFT users know, head apart."""
    plan = attachment(model).plan
    everything = plan.pretrained + plan.head_values
    print(
        f"trainable params: {plan.trained:,} || head params: {plan.head_values:,} || "
        f"all params: {everything:,} || trainable%: {100 * plan.trained / plan.pretrained:.4f}"
    )


def _fit_delta(model: nn.Module, delta: Delta, check: bool) -> Plan:
    if check:
        verify(model, delta.base, delta.head)
    plan = resolve(model, delta.recipe, delta.pooling)
    shapes, found = plan.shapes, {name: tuple(t.shape) for name, t in delta.tensors.items()}
    if set(plan.shapes) != set(found):
        missing, extra = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
        raise DeltaError(f"the delta does not fit {plan.model}: missing {missing[:3]}, unexpected {extra[:3]}")
    wrong = [name for name in shapes if shapes[name] != found[name]]
    if wrong:
        name = wrong[0]
        hint = "; load the model with smidgen.load(name, delta=delta)" if name in delta.head else ""
        raise DeltaError(f"{name} has shape {shapes[name]} in {plan.model} but {found[name]} in the delta{hint}")
    return plan


def place(model: nn.Module, plan: Plan) -> None:
    """Put a resolved plan on a model; `attach` without checks, seeds and the compiler reset."""
    owners: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        owners.setdefault(id(parameter), []).append(name)
    dtype = base_dtype(parameters)
    flags = {name: p.requires_grad for name, p in parameters.items()}
    added = [row for row in plan.rows if row.added]
    for row in added:
        check_editable(model.get_submodule(row.site.path), row.site)
    tensors = [row.method.init(row.site) for row in added]
    record = Attachment(plan, _swaps(plan, parameters, owners), [], flags, dtype)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    for row, fresh in zip(added, tensors, strict=True):
        module = model.get_submodule(row.site.path)
        device = next(module.parameters()).device
        fresh = {k: v.to(device=device, dtype=master_dtype(dtype)) for k, v in fresh.items()}
        edit = Edit(row.method, row.site, fresh)
        add_edit(module, row.key, edit)
        record.edits.append((row.site.path, row.key))
        record.added.update(zip((name for name, _ in row.names()), edit.parameters(), strict=True))
    for path, terms, norm in record.low_modules():
        place_casts(model.get_submodule(path), terms, dtype, norm)
    record.plug(model)
    record.handles.append(model.register_forward_pre_hook(refuse_cast))
    if plan.pooling is not None:
        record.handles.append(place_pooling(model, plan.pooling))
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = refuse_save
    model._smidgen = record  # type: ignore[assignment]


def _swaps(plan: Plan, parameters: Mapping[str, nn.Parameter], owners: Mapping[int, list[str]]) -> list[Swap]:
    names = [name for row in plan.rows if not row.added for name, _ in row.names()]
    trained = [*names, *(name for name, _ in plan.head)]
    # A norm in a low-precision base computes in float32 with both of its terms, even if one of them is frozen.
    norms = {
        f"{row.site.path}.{term}": None
        for row in plan.rows
        if row.site.kind == "norm" and not row.added
        for term, _ in row.site.terms
    }
    frozen = [name for name in norms if name not in trained and parameters[name].element_size() < 4]
    swaps = []
    for name in (*trained, *frozen):
        original = parameters[name]
        master = nn.Parameter(
            original.detach().to(master_dtype(original.dtype), copy=True), requires_grad=name in trained
        )
        swaps.append(Swap(name, tuple(owners[id(original)]), original, master, name in trained))
    return swaps


def refuse_cast(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of an attached model: masters that were cast are ruined, and that must not pass unseen."""
    check_masters(model)


def refuse_save(*args: Any, **kwargs: Any) -> None:
    """Stands in for save_pretrained on an attached model."""
    raise AttachError(SAVE_ERROR)
