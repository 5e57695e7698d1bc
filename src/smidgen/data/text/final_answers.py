"""Exact match of final answers, as of GSM8K's.

A right answer that has "####" is what stands behind it on its line; of what a model writes the same, or else the last
number. They are equal as numbers (1,000 and $1000.00) or else as texts. A right answer that is a number alone is
compared in the same way; any other one is equal to what is written as a whole, case and white space apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from smidgen.data.metrics import Metric

MARK = "####"
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def final_answer(text: str) -> str:
    """What stands behind "####" on its line, or else the last number; "" if there is neither."""
    if MARK in text:
        return text.split(MARK, 1)[1].strip().partition("\n")[0].strip()
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else ""


def same_answer(written: str, right: str) -> bool:
    """Whether what is written comes to the right answer."""
    if MARK not in right and _number(right) is None:
        return _words(written) == _words(right)
    wanted, found = (final_answer(text) for text in (right, written))
    number = _number(wanted)
    return _words(found) == _words(wanted) if number is None else number == _number(found)


def final_answer_accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of texts that come to one of their right answers."""
    pairs = zip(predictions, references, strict=True)
    return sum(any(same_answer(said, right) for right in rights) for said, rights in pairs) / len(predictions)


def _number(text: str) -> Decimal | None:
    plain = text.strip().rstrip(".").replace(",", "").replace("$", "")
    try:
        return Decimal(plain) if plain else None
    except InvalidOperation:
        return None


def _words(text: str) -> list[str]:
    return text.casefold().split()


FINAL_ANSWER = Metric("final_answer", final_answer_accuracy)
