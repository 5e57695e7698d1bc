"""What methods add to the loss."""

from __future__ import annotations

from torch import Tensor, nn

from smidgen.attachment import Attachment, attachment
from smidgen.method import Method, Tensors
from smidgen.rows import SHARED, Row


def penalty(model: nn.Module) -> Tensor | None:
    """The sum of the methods' penalties, a scalar; None if none has one. `fit` adds it to the loss."""
    record = attachment(model)
    found = None
    for index, method in enumerate(record.plan.recipe):
        if isinstance(method, Method) and method.overrides("penalty"):
            rows = rows_of(record, index)
            value = method.penalty([tensors_of(record, row) for row in rows], [row.site for row in rows])
            if value is not None:
                found = value if found is None else found + value
    return found


def penalised(loss: Tensor, model: nn.Module) -> Tensor:
    """The loss with the methods' penalties added to it."""
    more = penalty(model)
    return loss if more is None else loss + more


def rows_of(record: Attachment, index: int) -> list[Row]:
    """Where a term of the recipe adds tensors."""
    return [row for row in record.plan.rows if row.index == index and row.added and row.site.kind != SHARED]


def tensors_of(record: Attachment, row: Row) -> Tensors:
    """Symbol -> what is trained."""
    return {term: record.added[name] for term, name, _ in row.trained()}
