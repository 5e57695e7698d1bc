"""What methods add to the loss."""

from __future__ import annotations

from torch import Tensor, nn

from smidgen.methods.capabilities import Penalises
from smidgen.ports.attachment_record import attachment


def penalty(model: nn.Module) -> Tensor | None:
    """The sum of the attached methods' penalties, a scalar; None if none has one. `fit` adds it to the loss.

    Raises:
        AttachError: nothing is attached.
    """
    record = attachment(model)
    found = None
    for index, method in enumerate(record.plan.recipe):
        if isinstance(method, Penalises):
            entries = record.added_by(index)
            parts = [record.tensors_of(entry) for entry in entries]
            value = method.penalty(parts, [entry.site for entry in entries])
            if value is not None:
                found = value if found is None else found + value
    return found
