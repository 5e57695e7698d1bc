"""Which kind of task the columns of a split make, where nobody says."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset

from smidgen.common.errors import DataError, nearest
from smidgen.data.columns import Columns
from smidgen.data.kinds.base import TaskKind, kind_named


def infer_columns(rows: Dataset, kind: str | None, text: Sequence[str] | None, label: str | None) -> Columns:
    """Columns of a task: what is given, and the rest by known names and by the type of the label.

    Raises:
        DataError: a column or kind that does not exist; none, or more than one, that could be meant.
    """
    wanted = None if kind is None else kind_named(kind)
    there = rows.column_names
    for name in (*(text or ()), *([label] if label else [])):
        if name not in there:
            raise DataError(f"no column {name!r}; the columns are {', '.join(there)}{nearest(name, there)}")
    if wanted is not None:
        return wanted.columns(rows, text, label)
    own_first = list(TaskKind.registry.values())[::-1]
    for each in sorted(own_first, key=lambda each: each.general):
        found = each.claims(rows, text, label)
        if found is not None:
            return found
    raise DataError(f"the columns {', '.join(there)} are of no known kind of task; give kind=")
