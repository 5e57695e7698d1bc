"""References: models whose outputs an objective compares with, made of the very tensors of the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from smidgen.common.errors import TrainError
from smidgen.common.module_modes import evaluating
from smidgen.common.wrappers import bare
from smidgen.delta.attaching import attach, disabled, remove
from smidgen.delta.delta import Delta
from smidgen.ports.in_place.shared_parameters import shared_copy
from smidgen.sites.new_tensors import keep_note
from smidgen.steps.step import BASE, START, Reference

Models = Mapping[str, nn.Module | None]


def reference_models(model: nn.Module, wanted: Mapping[str, Reference]) -> Models:
    """Name -> a model in eval mode that computes without gradient; None for the base, which is the model itself.

    Args:
        model: with what is trained attached, where the run begins.

    Raises:
        TrainError: a reference of another type.
        DeltaError: a delta of another base.
    """
    return {name: _model(model, name, reference) for name, reference in wanted.items()}


def _model(model: nn.Module, name: str, reference: Reference) -> nn.Module | None:
    """The frozen model that a reference names, sharing what it can; None for the base, which is the model itself."""
    if isinstance(reference, str) and reference == BASE:
        return None
    if isinstance(reference, str) and reference == START:
        return _frozen(shared_copy(model))
    if isinstance(reference, Delta):
        twin = shared_copy(model)
        remove(twin)
        return _frozen(attach(keep_note(model, twin), reference))
    if isinstance(reference, nn.Module) and bare(reference) is not bare(model):
        device = next(iter(model.parameters())).device
        return _frozen(shared_copy(reference)).to(device)
    raise TrainError(
        f"the reference {name!r} is {reference!r:.40}; it is {BASE!r}, {START!r}, a Delta, or another module"
    )


def _frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


@contextmanager
def base_running(model: nn.Module) -> Iterator[None]:
    """Edits off, eval mode, no gradient."""
    with disabled(model), evaluating(bare(model)), torch.no_grad():
        yield
