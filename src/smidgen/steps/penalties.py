"""What methods add to the loss."""

from __future__ import annotations

from torch import Tensor, nn

from smidgen.methods.capabilities import Penalises
from smidgen.ports.attachment_record import attachment


def penalty(model: nn.Module) -> Tensor | None:
    """The sum of the methods' penalties, a scalar; None if none has one. `fit` adds it to the loss."""
    record = attachment(model)
    found = None
    for index, method in enumerate(record.plan.recipe):
        if isinstance(method, Penalises):
            rows = record.added_by(index)
            value = method.penalty([record.tensors_of(row) for row in rows], [row.site for row in rows])
            if value is not None:
                found = value if found is None else found + value
    return found
