"""Texts and labels as token ids, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from smidgen.common.errors import DataError
from smidgen.data.labels import IGNORED
from smidgen.data.text.causal_lm import language
from smidgen.sites.task_head import own_pooling

_CHUNK = 1000


class Encoded(Sequence[dict[str, Any]]):
    """Examples as dicts of plain lists: input_ids, attention_mask, token_type_ids if the tokenizer has them,
    labels.

    Attributes:
        max_length: the most tokens an example may have.
        truncated: number of examples that were longer and were cut.
        dropped: causal-lm: examples left out, as nothing to learn was left; tokens: words without any token
            left.
        lengths: number of tokens of each example.
    """

    def __init__(self, examples: list[dict[str, Any]], max_length: int, truncated: int = 0, dropped: int = 0) -> None:
        self._examples, self.max_length, self.truncated, self.dropped = (
            examples,
            max_length,
            truncated,
            dropped,
        )
        self.lengths = [len(example["input_ids"]) for example in examples]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        return self._examples[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._examples)

    def __repr__(self) -> str:
        return f"Encoded({len(self)} examples, max_length={self.max_length}, truncated={self.truncated})"


def encode(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    text: Sequence[str],
    label: str | None,
    max_length: int | None = None,
) -> Encoded:
    """Encode the rows of a split; the column `label` holds ids, floats or lists of ids, or is None for texts alone.

    Texts are cut on the right, the longer of a pair first. Tokens: the first sub-token of a word has its
    label, the others -100. Causal LM: see `smidgen.data.text.causal_lm`. Without `max_length` it is the tokenizer's, at
    most 512.

    Raises:
        DataError: the length leaves no room for text; the tokenizer cannot do what the kind needs; nothing is
            left.
    """
    length = _length(tokenizer, max_length)
    if kind == "causal-lm":
        examples, truncated, dropped = language(rows, tokenizer, tuple(text), length)
    else:
        one = _words if kind == "tokens" else _texts
        examples, truncated, dropped = [], 0, 0
        for start in range(0, len(rows), _CHUNK):
            part, cut, lost = one(rows[start : start + _CHUNK], tokenizer, text, label, length)
            examples += part
            truncated, dropped = truncated + cut, dropped + lost
    return Encoded(examples, length, truncated, dropped)


def _length(tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> int:
    # A tokenizer that knows no limit says 1e30.
    length = min(tokenizer.model_max_length, 512) if wanted is None else wanted
    least = tokenizer.num_special_tokens_to_add() + 1
    if isinstance(length, bool) or int(length) != length or length < max(2, least):
        raise DataError(f"max_length={length} leaves no room for text; it must be at least {max(2, least)}")
    return int(length)


Part = tuple[list[dict[str, Any]], int, int]


def _texts(
    rows: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[str],
    label: str | None,
    length: int,
) -> Part:
    columns = [rows[name] for name in text]
    encoded = tokenizer(*columns, truncation=False, verbose=False)
    long = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) > length]
    examples = _rows(encoded)
    if long:
        cut = tokenizer(*([c[i] for i in long] for c in columns), truncation=True, max_length=length)
        for i, example in zip(long, _rows(cut), strict=True):
            examples[i] = example
    if label is not None:
        for example, value in zip(examples, rows[label], strict=True):
            example["labels"] = value
    return examples, len(long), 0


def _rows(encoded: Any) -> list[dict[str, Any]]:
    keys = list(encoded.keys())
    return [dict(zip(keys, values, strict=True)) for values in zip(*(encoded[k] for k in keys), strict=True)]


def _words(
    rows: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[str],
    label: str | None,
    length: int,
) -> Part:
    if not tokenizer.is_fast:
        raise DataError(f"tokens need a fast tokenizer, which knows the words; {type(tokenizer).__name__} is not one")
    words, tags = rows[text[0]], rows[label or ""]
    options: dict[str, Any] = {"is_split_into_words": True, "verbose": False}
    try:
        long = sum(len(ids) > length for ids in tokenizer(words, truncation=False, **options)["input_ids"])
        encoded = tokenizer(words, truncation=True, max_length=length, **options)
    except AssertionError as error:
        raise DataError(
            f"the tokenizer takes no lists of words; load it with add_prefix_space=True ({error})"
        ) from error
    examples, lost = _rows(encoded), 0
    for i, example in enumerate(examples):
        example["labels"] = _first_only(encoded.word_ids(i), tags[i])
        lost += sum(tag != IGNORED for tag in tags[i]) - sum(value != IGNORED for value in example["labels"])
    return examples, long, lost


def _first_only(words: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """The word's tag at the first token of each word, -100 elsewhere. words: the word number of each
    token."""
    before = [None, *words[:-1]]
    return [IGNORED if w is None or w == b else tags[w] for w, b in zip(words, before, strict=True)]


def _check_padding(model: nn.Module, kind: str, pad: int) -> None:
    """Raises DataError if a classifier that reads the last token which is not padding takes another for padding."""
    if kind not in ("classification", "regression") or own_pooling(model) != "last":
        return
    config: Any = model.config
    known = config.get_text_config().pad_token_id
    if known != pad:
        raise DataError(
            f"{type(model).__name__} reads the last token that is not its padding (config.pad_token_id={known}), and "
            f"the tokenizer pads with {pad}; set model.config.pad_token_id = {pad}"
        )
