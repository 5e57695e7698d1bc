"""Token ids of conversations, cut where an answer ends, and what they were cut from."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from smidgen.common.errors import DataError
from smidgen.data.encoded import Example
from smidgen.data.labels import IGNORED
from smidgen.data.text.encoding import Part


class LongConversationWarning(UserWarning):
    """Conversations were longer than the limit, and were cut behind an answer, or left out."""


def answer_spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """(begin, end) of each run of labels, which are the assistant's turns."""
    learned = [value != IGNORED for value in labels]
    edges = [i for i, (a, b) in enumerate(zip([False, *learned], [*learned, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def whole_turns(pairs: Iterable[tuple[list[int], list[int]]], length: int) -> Part:
    """Examples of at most `length` tokens that end with an answer where they were longer; how many were cut, and left
    out.

    What is too long loses its last turns, up to the last answer that fits; where not even the first answer does, or
    where there is none, nothing is left to learn.

    Raises:
        DataError: nothing is left of any conversation.
    """
    examples, cut, long, silent = list[Example](), 0, 0, 0
    for ids, labels in pairs:
        ends = [end for _, end in answer_spans(labels)]
        fitting = [end for end in ends if end <= length]
        end = len(ids) if len(ids) <= length else max(fitting, default=0)
        if not ends or not end:
            silent, long = silent + (not ends), long + bool(ends)
            continue
        cut += end < len(ids)
        examples.append({"input_ids": ids[:end], "attention_mask": [1] * end, "labels": labels[:end]})
    if not examples:
        raise DataError(
            f"no conversation is left to learn from: of {long + silent}, {long} have a first answer that ends behind "
            f"max_length={length} tokens, and {silent} have no turn of the assistant; raise it, or check the roles"
        )
    _say(len(examples) + long + silent, cut, long, silent, length)
    return examples, cut + long, long + silent


def _say(count: int, cut: int, long: int, silent: int, length: int) -> None:
    """A warning of what is not learned whole."""
    said = []
    if cut:
        said.append(f"{cut} are longer than max_length={length} tokens and cut behind the last answer that fits")
    if long:
        said.append(f"{long} are left out, as their first answer ends behind max_length={length} tokens")
    if silent:
        said.append(f"{silent} without a turn of the assistant are left out")
    if said:
        warnings.warn(f"of {count} conversations {'; '.join(said)}", LongConversationWarning, stacklevel=2)
