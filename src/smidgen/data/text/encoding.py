"""Texts and labels as token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from datasets import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

from smidgen.common.errors import DataError
from smidgen.data.encoded import Cells, Encoded, Example
from smidgen.data.labels import IGNORED

_CHUNK = 1000
Part = tuple[list[Example], int, int]  # examples, number cut, number dropped


def text_length(tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> int:
    """The most tokens of an example: what is wanted, else the tokenizer's limit, at most 512.

    Raises:
        DataError: it leaves no room for text.
    """
    # A tokenizer that knows no limit says 1e30.
    length = min(tokenizer.model_max_length, 512) if wanted is None else wanted
    least = tokenizer.num_special_tokens_to_add() + 1
    if isinstance(length, bool) or int(length) != length or length < max(2, least):
        raise DataError(f"max_length={length} leaves no room for text; it must be at least {max(2, least)}")
    return int(length)


def encode_chunks(rows: Dataset, length: int, encode: Callable[[Cells], Part]) -> Encoded:
    """Encode rows, a thousand at a time."""
    examples, truncated, dropped = list[Example](), 0, 0
    for start in range(0, len(rows), _CHUNK):
        part, cut, lost = encode(rows[start : start + _CHUNK])
        examples += part
        truncated, dropped = truncated + cut, dropped + lost
    return Encoded(examples, length, truncated, dropped)


def encode_texts(
    rows: Cells, tokenizer: PreTrainedTokenizerBase, text: Sequence[str], label: str | None, length: int
) -> Part:
    """One text or two as one sequence, cut on the right, the longer of a pair first; the label as it is."""
    columns = [rows[name] for name in text]
    encoded = tokenizer(*columns, truncation=False, verbose=False)
    long = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) > length]
    examples = as_examples(encoded)
    if long:
        cut = tokenizer(*([c[i] for i in long] for c in columns), truncation=True, max_length=length)
        for i, example in zip(long, as_examples(cut), strict=True):
            examples[i] = example
    if label is not None:
        for example, value in zip(examples, rows[label], strict=True):
            example["labels"] = value
    return examples, len(long), 0


def as_examples(encoded: BatchEncoding) -> list[Example]:
    """What a tokenizer gives for many texts, text by text."""
    keys = list(encoded.keys())
    return [dict(zip(keys, values, strict=True)) for values in zip(*(encoded[k] for k in keys), strict=True)]


def encode_words(
    rows: Cells, tokenizer: PreTrainedTokenizerBase, text: Sequence[str], label: str | None, length: int
) -> Part:
    """Lists of words; the first token of a word has its label, the others -100. Dropped: words without any token left.

    Raises:
        DataError: the tokenizer does not know the words of its tokens, or takes no lists of words.
    """
    if not tokenizer.is_fast:
        raise DataError(f"tokens need a fast tokenizer, which knows the words; {type(tokenizer).__name__} is not one")
    words, tags = rows[text[0]], rows[label or ""]
    try:
        whole = tokenizer(words, truncation=False, is_split_into_words=True, verbose=False)
        encoded = tokenizer(words, truncation=True, max_length=length, is_split_into_words=True, verbose=False)
    except AssertionError as error:
        raise DataError(
            f"the tokenizer takes no lists of words; load it with add_prefix_space=True ({error})"
        ) from error
    long = sum(len(ids) > length for ids in whole["input_ids"])
    examples, lost = as_examples(encoded), 0
    for i, example in enumerate(examples):
        example["labels"] = labels = _first_only(encoded.word_ids(i), tags[i])
        lost += sum(tag != IGNORED for tag in tags[i]) - sum(value != IGNORED for value in labels)
    return examples, long, lost


def _first_only(words: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """The word's tag at the first token of each word, -100 elsewhere. words: the word number of each
    token."""
    before = [None, *words[:-1]]
    return [IGNORED if w is None or w == b else tags[w] for w, b in zip(words, before, strict=True)]
