"""Metrics of answers that are spans of a text, as SQuAD counts them (Rajpurkar et al. 2016, arXiv:1606.05250)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from smidgen.data.metrics import Metric

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of answers that are equal to one of the right ones, but for case, punctuation, articles and spaces."""
    return _best(lambda said, right: float(_plain(said) == _plain(right)), predictions, references)


def span_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean F1 of an answer's words, with the right one that gives most."""
    return _best(_overlap, predictions, references)


def _best(score: Callable[[str, str], float], predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    pairs = zip(predictions, references, strict=True)
    found = [max((score(said, right) for right in rights), default=float(not said)) for said, rights in pairs]
    return sum(found) / len(found)


def _overlap(said: str, right: str) -> float:
    words, wanted = _plain(said).split(), _plain(right).split()
    if not words or not wanted:
        return float(words == wanted)
    same = sum((Counter(words) & Counter(wanted)).values())
    return 2 * same / (len(words) + len(wanted))


def _plain(text: str) -> str:
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


EXACT_MATCH = Metric("exact_match", exact_match)
SPAN_F1 = Metric("span_f1", span_f1)
