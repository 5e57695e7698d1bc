"""Texts and labels as token ids, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from smidgen.columns import IGNORED
from smidgen.errors import DataError
from smidgen.heads import own_pooling, reads_end, takes_positions
from smidgen.language import language

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
    label, the others -100. Causal LM: see `smidgen.language`. Without `max_length` it is the tokenizer's, at
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


@dataclass(frozen=True)
class Collator:
    """Pads encoded examples into a batch of tensors, (B, T) each; labels (B, T) with -100, or (B,).

    Padding is on the right: no position, no first token and no causal model notices it there.

    Attributes:
        pads: padding value of each key.
        kind: of the task.
        multiple: T is a multiple of this.
        left: padding is on the left instead.
        positions: position_ids, from 0 in each example, are part of the batch.
    """

    pads: dict[str, int]
    kind: str
    multiple: int = 1
    left: bool = False
    positions: bool = False

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, kind: str, multiple: int = 1, model: nn.Module | None = None
    ) -> Collator:
        """A collator for a tokenizer and, where it is known, a model: left padding if that reads the last place.

        For causal-lm a missing padding token is the end token, masked anyway.

        Raises:
            DataError: the tokenizer has no token to pad with, or the model tells padding by another one.
        """
        pad = tokenizer.pad_token_id
        if pad is None and kind == "causal-lm":
            pad = tokenizer.eos_token_id
        if pad is None:
            raise DataError("the tokenizer has no padding token; set tokenizer.pad_token, such as to its eos_token")
        pads = {"input_ids": pad, "attention_mask": 0, "token_type_ids": tokenizer.pad_token_type_id}
        if model is None:
            return cls(pads, kind, multiple)
        _check_padding(model, kind, pad)
        left = reads_end(model)
        return cls(pads, kind, multiple, left, left and takes_positions(model))

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch. Raises KeyError if the examples differ in their keys."""
        batch = {}
        for key in examples[0]:
            values = [example[key] for example in examples]
            if key == "labels" and self.kind in ("classification", "regression"):
                dtype = torch.float32 if self.kind == "regression" else torch.long
                batch[key] = torch.tensor(values, dtype=dtype)
            else:
                batch[key] = self._pad(values, IGNORED if key == "labels" else self.pads[key])
        if self.positions:
            batch["position_ids"] = self._pad([range(len(example["input_ids"])) for example in examples], 0)
        return batch

    def _pad(self, values: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
        longest = max(map(len, values))
        padded = np.full((len(values), longest + -longest % self.multiple), pad, dtype=np.int64)
        for row, value in zip(padded, values, strict=True):
            row[len(row) - len(value) if self.left else 0 :][: len(value)] = value
        return torch.from_numpy(padded)


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
