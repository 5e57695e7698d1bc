"""Label names and their ids, and where in an example a label stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from datasets import ClassLabel, Dataset

from smidgen.common.errors import DataError
from smidgen.data.columns import COUNTED, Columns, and_more, reads_as_number
from smidgen.data.encoded import Column

UNLABELLED = (None, -1)


IGNORED = -100  # as a tag: the word is neither learned nor scored, as in torch's cross-entropy


class LabelPlace(Enum):
    """What the labels of a batch belong to."""

    EXAMPLE = auto()  # labels (B,): one of each example
    POSITION = auto()  # labels (B, T): of each position, -100 where there is none
    NEXT = auto()  # labels (B, T): position t predicts label t + 1


@dataclass(frozen=True)
class Labels:
    """Label values in id order, and the names they go by. Both are empty where labels are no names."""

    values: tuple[str | float, ...] = ()
    names: tuple[str, ...] = ()


def named_labels(rows: Dataset, columns: Columns, *, tags: bool = False) -> Labels:
    """The labels of a split: declared names if there are any, else whole numbers in order, else sorted names.

    Args:
        tags: each row has a list of them.

    Raises:
        DataError: labels are missing, of mixed types, or all the same.
    """
    assert columns.label is not None
    feature = rows.features[columns.label]
    declared = getattr(feature, "feature", feature)
    found = _distinct(label_values(rows, columns.label), columns, tags)
    if len(found) < 2:
        raise DataError(f"only one label in the data to learn from: {found[0]!r}; there must be at least two")
    if isinstance(declared, ClassLabel):
        return Labels(tuple(range(len(declared.names))), tuple(declared.names))
    return Labels(tuple(found), tuple(str(int(v)) if isinstance(v, float) else str(v) for v in found))


def label_values(rows: Dataset, label: str) -> Column:
    """The label column; spaces around a name are no part of it, and a name of spaces is none."""
    return [_stripped(value) for value in rows[label][:]]


def _stripped(value: object) -> object:
    if isinstance(value, list):
        return [_stripped(tag) for tag in value]
    return value if not isinstance(value, str) else value.strip() or None


def _ignored(tag: object) -> bool:
    return tag in (IGNORED, str(IGNORED))


def _distinct(values: Column, columns: Columns, tags: bool) -> list[str | float]:
    """The different labels of a column, or tags of all its lists, in order; whole numbers by value."""
    if tags and not all(isinstance(value, list) for value in values):
        raise DataError(f"label column {columns.label!r} must hold a list of tags in every row for kind 'tokens'")
    flat = [tag for value in values for tag in value if not _ignored(tag)] if tags else values
    found = set(flat)
    if not found or None in found:
        missing = [i for i, v in enumerate(values) if v is None or (tags and None in v)] or [0]
        where = f"row {missing[0]} of the data to learn from has no label in column {columns.label!r}"
        raise DataError(f"{where}{and_more(len(missing))}; fill the cell, or drop the row{COUNTED}")
    if len({type(value) for value in found}) > 1 or any(isinstance(v, (list, dict)) for v in found):
        raise DataError(f"label column {columns.label!r} holds mixed types: {sorted(map(repr, found))[:5]}")
    if any(isinstance(value, float) and not value.is_integer() for value in found):
        raise DataError(f"label column {columns.label!r} holds fractions; use kind='regression'")
    numeric = all(isinstance(value, str) and value.removeprefix("-").isdecimal() for value in found)
    return sorted(found, key=int) if numeric else sorted(found)


def is_unlabelled(rows: Dataset, columns: Columns, labels: Labels) -> bool:
    """Whether no row has a label: no such column, or only null, or only -1 where -1 is not a label."""
    if columns.label is None:
        return False
    if columns.label not in rows.column_names:
        return True
    return all(value in UNLABELLED and value not in labels.values for value in label_values(rows, columns.label))


def present_labels(rows: Dataset, split: str, columns: Columns) -> Column:
    """The labels of a split. Raises DataError if one is missing."""
    assert columns.label is not None
    values = label_values(rows, columns.label)
    if None in values:
        where = f"{split} has no label in row {values.index(None)} of column {columns.label!r}"
        raise DataError(f"{where}{and_more(values.count(None))}; drop the row, or all labels of {split}{COUNTED}")
    return values


def class_ids(rows: Dataset, split: str, columns: Columns, labels: Labels) -> list[int]:
    """Labels of a split as ids. Raises DataError if one is missing or unknown."""
    return list(map(_lookup(split, labels), present_labels(rows, split, columns)))


def tag_ids(rows: Dataset, split: str, columns: Columns, labels: Labels) -> list[list[int]]:
    """Tags of a split as lists of ids. Raises DataError if one is missing or unknown, or words and tags differ in
    number."""
    values, lookup = present_labels(rows, split, columns), _lookup(split, labels)
    for i, (words, tags) in enumerate(zip(rows[columns.text[0]][:], values, strict=True)):
        if words is None or len(words) != len(tags):
            raise DataError(f"{split} row {i} has {len(words or [])} words and {len(tags)} tags{COUNTED}")
    return [[IGNORED if _ignored(tag) else lookup(tag) for tag in tags] for tags in values]


def _lookup(split: str, labels: Labels) -> Callable[[str | float], int]:
    """The function from a label to its class id; it raises DataError for one that training has not seen."""
    ids = {value: i for i, value in enumerate(labels.values)}

    def lookup(value: str | float) -> int:
        try:
            return ids[value]
        except (KeyError, TypeError):
            known = ", ".join(labels.names[:10]) + (", ..." if len(labels.names) > 10 else "")
            raise DataError(f"{split} has the label {value!r}, unseen in training; known are {known}") from None

    return lookup


def label_numbers(rows: Dataset, split: str, columns: Columns) -> list[float]:
    """Labels of a split as numbers. Raises DataError if one is missing or not a finite number."""
    values, column = present_labels(rows, split, columns), columns.label
    bad = [i for i, v in enumerate(values) if isinstance(v, bool | str) or not reads_as_number(v)]
    if bad:
        row = next((i for i in bad if not reads_as_number(values[i])), bad[0])  # what made a column of numbers text
        raise DataError(f"{split} row {row}: {column!r} is {values[row]!r}, not a finite number{COUNTED}")
    return [float(value) for value in values]
