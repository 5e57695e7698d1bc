"""Which columns hold the texts and the label, what kind of task that makes, and labels turned into ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, Value

from smidgen.common.argument_spelling import KINDS
from smidgen.common.errors import DataError, nearest

PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"),
    ("question1", "question2"), ("text1", "text2"), ("text_a", "text_b"),
)  # fmt: skip


SINGLES = ("sentence", "text", "tweet", "review", "content", "question", "utterance", "tokens", "words")


TARGETS = ("label", "labels", "target", "score", "category", "class", "intent", "ner_tags", "tags")


CLASSES = 20  # so many whole numbers written as 0.0, 1.0, ... are still labels


@dataclass(frozen=True)
class Columns:
    """What the columns of a task are: kind, text columns, label column (None for causal-lm).

    `note` says how the label column was read where that could be doubted.
    """

    kind: str
    text: tuple[str, ...]
    label: str | None
    note: str = ""


def infer(rows: Dataset, kind: str | None, text: Sequence[str] | None, label: str | None) -> Columns:
    """Columns of a task: what is given, and the rest by known names and by the type of the label.

    Raises:
        DataError: a column or kind that does not exist; none, or more than one, that could be meant.
    """
    if kind is not None and kind not in KINDS:
        raise DataError(f"unknown kind {kind!r}; there are {', '.join(KINDS)}{nearest(kind, KINDS)}")
    there = rows.column_names
    for name in (*(text or ()), *([label] if label else [])):
        if name not in there:
            raise DataError(f"no column {name!r}; the columns are {', '.join(there)}{nearest(name, there)}")
    if kind == "causal-lm" or (kind is None and label is None and not _known(there, TARGETS)):
        language = tuple(text) if text and kind else _language(there, bool(kind)) if not text else None
        if language:
            return Columns("causal-lm", _checked_language(rows, language), None)
    label = label or _only(_known(there, TARGETS), there, "label")
    kind, note = (kind, "") if kind else _kind_of(rows, label)
    fitting = [n for n in there if n != label and hasattr(rows.features[n], "feature") == (kind == "tokens")]
    if kind == "tokens" and not fitting and not text:
        raise DataError(f"kind='tokens' needs a column of lists of words, as .jsonl and .conll files have; the columns "
                        f"are {', '.join(there)}")  # fmt: skip
    text = tuple(text) if text else _texts(fitting, there)
    _check_types(rows, kind, text)
    return Columns(kind, text, label, note)


def _known(there: Sequence[str], names: Sequence[str]) -> list[str]:
    return [name for name in names if name in there]


def _only(found: Sequence[Any], there: Sequence[str], what: str) -> Any:
    if len(found) != 1:
        names = ["+".join(one) if isinstance(one, tuple) else one for one in found]
        which = f"could be any of {', '.join(names)}" if found else "is not known by name"
        raise DataError(f"the {what} column {which}; the columns are {', '.join(there)}; name it with {what}=")
    return found[0]


def _texts(fitting: Sequence[str], there: Sequence[str]) -> tuple[str, ...]:
    pairs = [pair for pair in PAIRS if set(pair) <= set(fitting)]
    used = {name for pair in pairs for name in pair}
    singles = [(name,) for name in _known(fitting, SINGLES) if name not in used]
    return tuple(_only([*pairs, *singles], there, "text"))


def _language(there: Sequence[str], plain: bool) -> tuple[str, ...]:
    forms = [("prompt", "completion"), ("messages",), *([("text",)] if plain else [])]
    found = [form for form in forms if set(form) <= set(there)]
    return found[0] if len(found) == 1 else _only(found, there, "text") if plain else ()


def _checked_language(rows: Dataset, text: tuple[str, ...]) -> tuple[str, ...]:
    if text != ("messages",):
        _check_types(rows, "causal-lm", text)
    return text


def _kind_of(rows: Dataset, name: str) -> tuple[str, str]:
    """The kind that the label column's type tells, and a note where its values tell it."""
    feature = rows.features[name]
    if isinstance(feature, ClassLabel):
        return "classification", ""
    if isinstance(feature, Value) and feature.dtype != "null":
        if feature.dtype.startswith("float"):
            return _kind_of_numbers(rows[name][:])
        if "string" in feature.dtype:
            _refuse_stray(rows[name][:], name)
        return "classification", ""
    if hasattr(feature, "feature"):
        return "tokens", ""
    what = "no values" if isinstance(feature, Value) else "mixed types" if _mixed(feature) else str(feature)
    raise DataError(f"label column {name!r} holds {what}; expected names, whole numbers, numbers or lists of tags")


def _kind_of_numbers(values: Sequence[float | None]) -> tuple[str, str]:
    """Few whole numbers are labels however they are written: 0 beside an empty cell is often saved as 0.0."""
    found = {value for value in values if value is not None}
    if not found or not all(value.is_integer() for value in found):
        return "regression", ""
    what = f"holds {len(found)} whole numbers written as {min(found)}"
    if len(found) > CLASSES:
        return "regression", f"{what}, read as numbers; give kind='classification' to read labels"
    return "classification", f"{what}, read as labels; give kind='regression' to read numbers"


def _refuse_stray(values: Sequence[str | None], name: str) -> None:
    """A word among fractions would make each of these a label."""
    words = [i for i, value in enumerate(values) if value is not None and not _reads_as_number(value)]
    fractions = sum(value is not None and "." in value and _reads_as_number(value) for value in values)
    if words and 2 * fractions > len(values) and 10 * len(words) <= len(values):
        stray = f"{values[words[0]]!r} in row {words[0]}"
        raise DataError(f"label column {name!r} holds numbers, but {stray}{_more(len(words))}; mend the row, or give "
                        f"kind='classification'{_COUNTED}")  # fmt: skip


def _reads_as_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


_COUNTED = " (rows are counted from 0)"


def _more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""


def _mixed(feature: Any) -> bool:
    return type(feature).__name__ == "Json"  # what datasets makes of a column whose rows differ in type


def _check_types(rows: Dataset, kind: str, text: tuple[str, ...]) -> None:
    most = 1 if kind == "tokens" else 2
    if not 1 <= len(text) <= most:
        raise DataError(f"{kind} takes {' or '.join('12'[:most])} text columns, found {len(text)}: {', '.join(text)}")
    for name in text:
        feature = rows.features[name]
        inner = getattr(feature, "feature", None) if kind == "tokens" else feature
        if not (isinstance(inner, Value) and "string" in inner.dtype):
            what = "mixed types" if _mixed(feature) else getattr(feature, "dtype", feature)
            wanted = "lists of words" if kind == "tokens" else "text"
            raise DataError(f"column {name!r} holds {what}; expected {wanted}")


def check_texts(rows: Dataset, split: str, columns: Columns) -> None:
    """Raises DataError if a split lacks a text column, or a row of it."""
    for name in columns.text:
        if name not in rows.column_names:
            raise DataError(f"{split} has no column {name!r}; its columns are {', '.join(rows.column_names)}")
        values = rows[name][:]
        if None in values:
            where = f"{split} row {values.index(None)} has no text in column {name!r}"
            raise DataError(f"{where}{_more(values.count(None))}; fill the cell, or drop the row{_COUNTED}")
