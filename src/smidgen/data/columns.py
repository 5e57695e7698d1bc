"""Columns of a split: known names of texts and labels, and what the columns of a task are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import SupportsFloat, TypeVar

from datasets import ClassLabel, Dataset, Value

from smidgen.common.errors import DataError

PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"),
    ("question1", "question2"), ("text1", "text2"), ("text_a", "text_b"),
)  # fmt: skip


SINGLES = ("sentence", "text", "tweet", "review", "content", "question", "utterance", "tokens", "words")


TARGETS = ("label", "labels", "target", "score", "category", "class", "intent", "ner_tags", "tags")


CLASSES = 20  # so many whole numbers written as 0.0, 1.0, ... are still labels

_Name = TypeVar("_Name", str, tuple[str, ...])

COUNTED = " (rows are counted from 0)"


@dataclass(frozen=True)
class Columns:
    """What the columns of a task are: kind, input columns, label column (None where there is none).

    `note` says how the label column was read where that could be doubted. `source`: the columns of the source that the
    input columns are made of, where they are others.
    """

    kind: str
    text: tuple[str, ...]
    label: str | None
    note: str = ""
    source: tuple[str, ...] = ()


class LabelType(Enum):
    """What a label column holds."""

    NAMES = auto()
    NUMBERS = auto()
    TAGS = auto()


def known_columns(there: Sequence[str], names: Sequence[str]) -> list[str]:
    """Those of some names that are there."""
    return [name for name in names if name in there]


def only_column(found: Sequence[_Name], there: Sequence[str], what: str) -> _Name:
    """The one that was found. Raises DataError if there is none, or more than one."""
    if len(found) != 1:
        names = ["+".join(one) if isinstance(one, tuple) else one for one in found]
        which = f"could be any of {', '.join(names)}" if found else "is not known by name"
        raise DataError(f"the {what} column {which}; the columns are {', '.join(there)}; name it with {what}=")
    return found[0]


def label_column(rows: Dataset, label: str | None) -> str:
    """The label column: what is given, or the one that is known by name."""
    there = rows.column_names
    found: str = label or only_column(known_columns(there, TARGETS), there, "label")
    return found


def find_texts(rows: Dataset, label: str | None, *, lists: bool = False) -> tuple[str, ...]:
    """Columns of one text or two, or of lists of words, by known names. Raises DataError if that is not plain."""
    there = rows.column_names
    fitting = [n for n in there if n != label and hasattr(rows.features[n], "feature") == lists]
    if lists and not fitting:
        raise DataError(f"kind='tokens' needs a column of lists of words, as .jsonl and .conll files have; the columns "
                        f"are {', '.join(there)}")  # fmt: skip
    pairs = [pair for pair in PAIRS if set(pair) <= set(fitting)]
    used = {name for pair in pairs for name in pair}
    singles = [(name,) for name in known_columns(fitting, SINGLES) if name not in used]
    return tuple(only_column([*pairs, *singles], there, "text"))


def label_type(rows: Dataset, name: str) -> tuple[LabelType, str]:
    """What a label column's type tells that it holds, and a note where its values tell it.

    Raises:
        DataError: it holds nothing, mixed types, or words among fractions.
    """
    feature = rows.features[name]
    if isinstance(feature, ClassLabel):
        return LabelType.NAMES, ""
    if isinstance(feature, Value) and feature.dtype != "null":
        if feature.dtype.startswith("float"):
            return _type_of_numbers(rows[name][:])
        if "string" in feature.dtype:
            _refuse_stray(rows[name][:], name)
        return LabelType.NAMES, ""
    if hasattr(feature, "feature"):
        return LabelType.TAGS, ""
    what = "no values" if isinstance(feature, Value) else "mixed types" if _mixed(feature) else str(feature)
    raise DataError(f"label column {name!r} holds {what}; expected names, whole numbers, numbers or lists of tags")


def _type_of_numbers(values: Sequence[float | None]) -> tuple[LabelType, str]:
    """Few whole numbers are labels however they are written: 0 beside an empty cell is often saved as 0.0."""
    found = {value for value in values if value is not None}
    if not found or not all(value.is_integer() for value in found):
        return LabelType.NUMBERS, ""
    what = f"holds {len(found)} whole numbers written as {min(found)}"
    if len(found) > CLASSES:
        return LabelType.NUMBERS, f"{what}, read as numbers; give kind='classification' to read labels"
    return LabelType.NAMES, f"{what}, read as labels; give kind='regression' to read numbers"


def _refuse_stray(values: Sequence[str | None], name: str) -> None:
    """A word among fractions would make each of these a label."""
    words = [i for i, value in enumerate(values) if value is not None and not reads_as_number(value)]
    fractions = sum(value is not None and "." in value and reads_as_number(value) for value in values)
    if words and 2 * fractions > len(values) and 10 * len(words) <= len(values):
        stray = f"{values[words[0]]!r} in row {words[0]}"
        raise DataError(f"label column {name!r} holds numbers, but {stray}{and_more(len(words))}; mend the row, or "
                        f"give kind='classification'{COUNTED}")  # fmt: skip


def reads_as_number(value: object) -> bool:
    """Whether a cell holds a finite number, or the text of one."""
    try:
        return isinstance(value, str | SupportsFloat) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def and_more(count: int) -> str:
    """` and 3 more` beside the first of four."""
    return f" and {count - 1} more" if count > 1 else ""


def _mixed(feature: object) -> bool:
    return type(feature).__name__ == "Json"  # what datasets makes of a column whose rows differ in type


def check_text_types(rows: Dataset, kind: str, text: Sequence[str], *, most: int = 2, lists: bool = False) -> None:
    """Raises DataError unless there are one to `most` columns, of text, or of lists of words."""
    if not 1 <= len(text) <= most:
        raise DataError(f"{kind} takes {' or '.join('12'[:most])} text columns, found {len(text)}: {', '.join(text)}")
    for name in text:
        feature = rows.features[name]
        inner = getattr(feature, "feature", None) if lists else feature
        if not (isinstance(inner, Value) and "string" in inner.dtype):
            what = "mixed types" if _mixed(feature) else getattr(feature, "dtype", feature)
            wanted = "lists of words" if lists else "text"
            raise DataError(f"column {name!r} holds {what}; expected {wanted}")


def check_inputs(rows: Dataset, split: str, columns: Columns, what: str = "text") -> None:
    """Raises DataError if a split lacks an input column, or a row of it."""
    for name in columns.text:
        if name not in rows.column_names:
            raise DataError(f"{split} has no column {name!r}; its columns are {', '.join(rows.column_names)}")
        values = rows[name][:]
        if None in values:
            where = f"{split} row {values.index(None)} has no {what} in column {name!r}"
            raise DataError(f"{where}{and_more(values.count(None))}; fill the cell, or drop the row{COUNTED}")
