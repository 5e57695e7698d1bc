"""Several deltas of one recipe on one model: the rows of a batch each have their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from smidgen.common.errors import DeltaError
from smidgen.common.module_modes import modes_kept
from smidgen.common.wrappers import bare
from smidgen.delta.attaching import attach, remove
from smidgen.delta.delta import Delta
from smidgen.ports.rows import stack_results


@contextmanager
def attached_rows(model: nn.Module, deltas: Sequence[Delta], verify: bool = True) -> Iterator[nn.Module]:
    """Attach several deltas of one recipe in eval mode; take them off on leaving.

    Inside, `with rows_from(index): model(**batch)` computes row b of a batch with `deltas[index[b]]`, as that delta
    alone would: LN and the other methods that have a form by row. A head may have other values in each, not another
    shape.

    Args:
        deltas: at least one; all of one recipe, with tensors of the same names and shapes.
        verify: whether the base is compared with the deltas' fingerprints.

    Raises:
        DeltaError: the deltas do not have one recipe and one layout, or belong to another base.
        AttachError: a method has no form by row.
    """
    check_same_layout(deltas)
    with modes_kept(model):
        for delta in deltas if verify else ():
            attach(model, delta)
            remove(model)
        attach(model, deltas[0], verify=False)
        handles = []
        try:
            handles = stack_results(bare(model), [delta.tensors for delta in deltas])
            model.eval()
            yield model
        finally:
            for handle in handles:
                handle.remove()
            remove(model)


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
