"""A validation split where a source has none: cut off train by the seed, label by label."""

from __future__ import annotations

from collections.abc import Mapping

from datasets import Dataset

from smidgen.data.columns import Columns
from smidgen.data.kinds.base import kind_named
from smidgen.data.readers import SPLITS
from smidgen.data.splits import hold_out


def cut_validation(splits: Mapping[str, Dataset], columns: Columns, validation: float, seed: int) -> dict[str, Dataset]:
    """The splits with a share (or a whole number) of train as validation, the same for the same seed.

    Raises:
        DataError: the rows are too few or too alike to be cut.
    """
    train, kind = splits["train"], kind_named(columns.kind)
    strata = train[columns.label][:] if kind.stratified and columns.label else None
    kept, held = hold_out(kind.keys(train, columns), strata, validation, seed)
    found = {**splits, "train": train.select(kept), "validation": train.select(held)}
    return {name: found[name] for name in SPLITS if name in found}
