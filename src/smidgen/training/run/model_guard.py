"""A model lent to a run: given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from smidgen.common.module_modes import modes_kept
from smidgen.delta.attaching import remove
from smidgen.ports.attachment_record import is_attached, refuse_attached


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside: afterwards nothing is attached, modes are as before, and no gradient is left.

    Raises:
        AttachError: something is attached already, which stays.
    """
    refuse_attached(model)
    own = dict(model.__dict__)
    try:
        with modes_kept(model):
            yield
    finally:
        if is_attached(model):
            remove(model)
        model.zero_grad(set_to_none=True)
        for name in ("_is_accelerate_prepared", "_original_forward", "forward"):  # Accelerate leaves them behind
            model.__dict__.pop(name, None)
            model.__dict__.update({name: own[name]} if name in own else {})
