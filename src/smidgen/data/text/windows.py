"""Two texts as one sequence; a second one that is too long in windows that overlap, as BERT reads SQuAD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import BatchEncoding, PreTrainedTokenizerBase

from smidgen.common.errors import DataError

OVERLAP = 128  # tokens that a window shares with the one before, at most half of its room
TENSORS = ("input_ids", "attention_mask", "token_type_ids")
Spans = list[tuple[int, int] | None]


@dataclass(frozen=True)
class Window:
    """A part of a pair of texts.

    Attributes:
        inputs: what the model takes.
        spans: of each token, its place in the second text, in characters; None outside of it.
        begin: character of the second text at which the window begins.
    """

    inputs: dict[str, list[int]]
    spans: Spans
    begin: int


def windows_of(
    tokenizer: PreTrainedTokenizerBase, firsts: Sequence[str], seconds: Sequence[str], length: int
) -> list[list[Window]]:
    """The windows of each pair, in order: one where both texts fit into `length` tokens.

    Raises:
        DataError: a first text leaves no room for the second.
    """
    whole = tokenizer(list(firsts), list(seconds), truncation=False, verbose=False, return_offsets_mapping=True)
    found = []
    for i, ids in enumerate(whole["input_ids"]):
        if len(ids) <= length:
            found.append([_window(whole, i, True)])
        else:
            room = length - sum(number != 1 for number in whole.sequence_ids(i))
            found.append(_parts(tokenizer, firsts[i], seconds[i], length, room))
    return found


def _parts(tokenizer: PreTrainedTokenizerBase, first: str, second: str, length: int, room: int) -> list[Window]:
    """Windows of a pair that is too long. `room`: tokens of the second text in each."""
    if room < 2:
        raise DataError(
            f"max_length={length} leaves room for {max(room, 0)} tokens of the text beside {first[:40]!r}; it must be "
            f"at least {length - room + 2}"
        )
    cut = tokenizer(
        [first], [second], truncation="only_second", max_length=length, stride=min(OVERLAP, room // 2),
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    return [_window(cut, i, i == 0) for i in range(len(cut["input_ids"]))]


def _window(encoded: BatchEncoding, i: int, first: bool) -> Window:
    inside = [number == 1 for number in encoded.sequence_ids(i)]
    spans = [tuple(pair) if own else None for pair, own in zip(encoded["offset_mapping"][i], inside, strict=True)]
    begin = 0 if first else next(span[0] for span in spans if span is not None)
    return Window({key: encoded[key][i] for key in TENSORS if key in encoded}, spans, begin)
