"""Several deltas of one recipe on one model: the rows of a batch each have their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from smidgen.common.errors import DeltaError
from smidgen.delta.compatibility import fitted
from smidgen.delta.delta import Delta
from smidgen.ports.by_row.mixture import Mixture
from smidgen.ports.forward_state import Mix, RowBlock

LAYOUT = "rows"


@contextmanager
def attached_rows(model: nn.Module, deltas: Sequence[Delta], verify: bool = True) -> Iterator[nn.Module]:
    """Attach several deltas of one recipe in eval mode; take them off on leaving.

    Inside, `with rows_from(index): model(**batch)` computes row b of a batch with `deltas[index[b]]`, as that delta
    alone would: LN and the other methods that have a form by row. A head may have other values in each, not another
    shape. For deltas of different recipes see `smidgen.Server`.

    Args:
        deltas: at least one; all of one recipe, with tensors of the same names and shapes.
        verify: whether the base is compared with the deltas' fingerprints.

    Raises:
        DeltaError: the deltas do not have one recipe and one layout, or belong to another base.
        AttachError: a method has no form by row.
    """
    check_same_layout(deltas)
    plans = [fitted(model, delta, verify) for delta in (deltas if verify else deltas[:1])]
    mixture = Mixture(model)
    try:
        mixture.add(LAYOUT, plans[0])
        stacked = {name: torch.stack([delta.tensors[name] for delta in deltas]) for name in plans[0].shapes}
        device = next(model.parameters()).device
        tables = {name: tensor.to(device) for name, tensor in stacked.items()}
        mixture.choose_by(Results(tables, frozenset(deltas[0].head), deltas[0].pooling))
        yield model
    finally:
        mixture.close()


class Results:
    """The results of one layout, stacked, by name (n, ...); called with rows (B,) it gives each row's."""

    def __init__(self, tables: Mapping[str, Tensor], head: frozenset[str], pooling: str | None) -> None:
        self.tables, self.head, self.pooling = tables, head, pooling

    def __call__(self, rows: Tensor) -> Mix:
        """One block of all rows."""
        found = {name: tensor[rows.to(tensor.device)] for name, tensor in self.tables.items()}
        block = RowBlock(LAYOUT, slice(0, len(rows)), {n: t for n, t in found.items() if n not in self.head})
        heads = {name: tensor for name, tensor in found.items() if name in self.head}
        return Mix((block,), heads, {self.pooling: torch.arange(len(rows))} if self.pooling else {})


def check_same_layout(deltas: Sequence[Delta]) -> None:
    """Raises DeltaError unless deltas have one recipe, one pooling and tensors of the same names and shapes."""
    if not deltas:
        raise DeltaError("there is no delta; give at least one")
    first = deltas[0]
    shapes = {name: tensor.shape for name, tensor in first.tensors.items()}
    for place, delta in enumerate(deltas):
        if delta.recipe != first.recipe or delta.pooling != first.pooling:
            raise DeltaError(f"delta {place} is of {delta.recipe}, the first of {first.recipe}; attach them apart")
        found = {name: tensor.shape for name, tensor in delta.tensors.items()}
        if wrong := sorted(n for n in {*shapes, *found} if shapes.get(n) != found.get(n)):
            what = tuple(found[wrong[0]]) if wrong[0] in found else "nothing"
            raise DeltaError(f"delta {place} has {what} as {wrong[0]}, the first another; attach them apart")
