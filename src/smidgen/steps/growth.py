"""Events at optimiser steps: a method goes on with other tensors, and the optimiser's state follows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from smidgen.common.errors import TrainError
from smidgen.common.seeding import seeded
from smidgen.common.wrappers import bare
from smidgen.methods.capabilities import Grows
from smidgen.ports.attachment_record import Attachment, attachment, trained_parameters


def after_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, total: int, seed: int = 0) -> bool:
    """Let methods that grow do so; for one's own loop, behind each optimiser step and its `zero_grad`.

    Args:
        step: of the optimiser, from 1.
        total: how many steps there will be.
        seed: of what is drawn, with the step.

    Returns:
        Whether tensors were replaced: a wrapper such as DDP has to be made anew then.

    Raises:
        TrainError: a method's event gave tensors that it says events cannot lead to.
    """
    record, changed = attachment(model), False
    for index, method in enumerate(record.plan.recipe):
        if not isinstance(method, Grows) or not method.due(step, total):
            continue
        entries = record.added_by(index)
        parts = [{term: p.detach() for term, p in record.tensors_of(entry).items()} for entry in entries]
        with seeded(seed, step, index):
            sites = [entry.site for entry in entries]
            found, record.memory[index] = method.event(step, total, sites, parts, record.memory.get(index, {}))
        values = {entry.name(term): t for entry, part in zip(entries, found, strict=True) for term, t in part.items()}
        changed |= assign(model, values, optimizer)
    return changed


def assign(model: nn.Module, values: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None) -> bool:
    """Give trained tensors these values; those of another shape are replaced, also in the optimiser.

    values: saved name -> tensor, for some or all trained tensors. Returns whether any was replaced.
    """
    record, trained, model = attachment(model), trained_parameters(model), bare(model)
    other = {name: value for name, value in values.items() if value.shape != trained[name].shape}
    with torch.no_grad():
        for name, value in values.items():
            if name not in other:
                trained[name].copy_(value)
    if other:
        _resize(model, record, other)
        for name in other:
            if optimizer is not None:
                follow(optimizer, trained[name], record.added[name])
        torch.compiler.reset()
    return bool(other)


def _resize(model: nn.Module, record: Attachment, values: Mapping[str, Tensor]) -> None:
    """Puts tensors of new shapes in the place of the trained ones, and the shapes into the record's plan."""
    entries = []
    for entry in record.plan.entries:
        found = {term: values[entry.name(term)] for term, _ in entry.terms if entry.name(term) in values}
        if found:
            shapes = {**dict(entry.terms), **{term: tuple(t.shape) for term, t in found.items()}}
            if not (entry.added and isinstance(entry.method, Grows) and entry.method.grown(shapes, entry.site)):
                raise TrainError(f"{entry.method} at {entry.site.name} cannot have tensors of the shapes {shapes}")
            for term, value in found.items():
                old = record.added[entry.name(term)]
                new = nn.Parameter(value.detach().to(old).clone())
                setattr(model.get_submodule(entry.name(term).rpartition(".")[0]), term, new)
                record.added[entry.name(term)] = new
            entry = replace(entry, terms=tuple(shapes.items()), grown=True)
        entries.append(entry)
    record.plan = replace(record.plan, entries=tuple(entries))


def follow(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    """Let an optimiser train `new` in place of `old`: its state is kept in the leading corner of what is larger.

    There is one count of steps for a tensor, so new values cannot begin at step 0. Their first moment is 0; their
    second one, which the rate is divided by, is the mean of the old ones: at 0 they would take steps several times
    the rate.
    """
    inside: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's
    for group in inside.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = inside.state.pop(old, None)
    if state:
        inside.state[new] = {
            key: _corner(value, new, squared="sq" in key)
            if isinstance(value, Tensor) and value.shape == old.shape
            else value
            for key, value in state.items()
        }


def _corner(old: Tensor, new: Tensor, squared: bool) -> Tensor:
    found = torch.full_like(new, float(old.mean()) if squared else 0.0, dtype=old.dtype, requires_grad=False)
    common = tuple(slice(min(a, b)) for a, b in zip(old.shape, new.shape, strict=True))
    found[common] = old[common]
    return found
