"""A model lent to a run: given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from smidgen.common.module_modes import modes_kept
from smidgen.delta.attaching import remove
from smidgen.ports.attachment_record import is_attached, refuse_attached
from smidgen.ports.observers import restore_methods, stand_in

LEFT = {"_is_accelerate_prepared", "_original_forward", "forward"}  # what Accelerate leaves behind


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside: afterwards nothing is attached, modes are as before, and no gradient is left.

    Raises:
        AttachError: something is attached already, which stays.
    """
    refuse_attached(model)
    own = dict(vars(model))
    try:
        with modes_kept(model):
            yield
    finally:
        if is_attached(model):
            remove(model)
        model.zero_grad(set_to_none=True)
        restore_methods(model, *LEFT)
        for name in LEFT & own.keys():
            stand_in(model, name, own[name])
