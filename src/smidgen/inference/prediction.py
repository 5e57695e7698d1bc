"""predict: what a model with a delta says about new texts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smidgen.common.errors import DataError
from smidgen.common.wrappers import bare
from smidgen.data.conll import is_tagged
from smidgen.data.labels import IGNORED
from smidgen.data.readers import FORMATS, decode, read_rows
from smidgen.data.text.collate import Collator
from smidgen.data.text.encoding import encode
from smidgen.delta.attaching import attached
from smidgen.delta.delta import Delta
from smidgen.inference.forward_pass import forwards

Text = str | list[Any]  # a list of words (tokens), or of messages


@dataclass(frozen=True)
class Prediction:
    """What a model says about one text.

    Attributes:
        answer: label name, number, labels of the words, or the continuation.
        probabilities: label -> probability, for classification.
    """

    text: str
    answer: Any
    pair: str | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The answer as text."""
        return str(self.answer)


def predict(
    model: PreTrainedModel,
    texts: Sequence[Text],
    *,
    delta: Delta,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Text] | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 64,
) -> list[Prediction]:
    """What a delta's model says about new texts: labels, numbers, or continuations of a causal LM.

    Args:
        texts: strings; for tokens also lists of words, else parted by white space; for chats also lists of messages.
        pairs: the second text of each, for tasks of two texts.

    Raises:
        DataError: no texts, or the task takes two texts and got one, or the other way round.
    """
    model = bare(model)
    _check(texts, pairs, len(_columns(delta)))
    answer = {"causal-lm": _continue, "tokens": _tag}.get(_kind(delta), _classify)
    with attached(model, delta):
        return answer(model, tokenizer, delta, list(texts), pairs, (batch_size, max_new_tokens))


def read_texts(path: Path, delta: Delta) -> tuple[list[Text], list[Text] | None]:
    """Texts of a file, and their pairs if the task has two.

    From rows (.csv .tsv .json .jsonl .parquet) come the task's text columns, from words with tags (.conll and the like,
    also named .txt) the words; of any other file each line is a text, blank ones apart.

    Raises:
        DataError: the file cannot be read or has not got the columns, or a row has no text.
    """
    kind, columns = _kind(delta), _columns(delta)
    suffix = path.suffix.lower()
    if FORMATS.get(suffix, "text") == "text":
        text = decode(path)
        if not (kind == "tokens" and is_tagged(text)):
            # Not str.splitlines, which would also part a text at a form feed or at U+2028.
            lines = [line.strip("\r") for line in text.split("\n")]
            return [line for line in lines if line.strip()], None
    rows, note = read_rows(path)
    if note:
        warnings.warn(f"{path.name} {note}", stacklevel=2)
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        there = ", ".join(rows.column_names)
        raise DataError(f"{path} has no column {missing[0]!r}, which the delta's task reads; its columns are {there}")
    wanted = list if kind == "tokens" or columns == ["messages"] else str
    texts = [_texts(path, name, rows[name][:], wanted) for name in columns]
    return texts[0], texts[1] if len(texts) == 2 else None


def _texts(path: Path, name: str, values: list[Any], wanted: type) -> list[Text]:
    for row, value in enumerate(values):
        if not value or not isinstance(value, wanted):
            found = "empty" if not value else f"{str(value)[:40]!r}"
            what = "a text" if wanted is str else "a list"
            raise DataError(f"{path} row {row}: column {name!r} is {found}, not {what} (rows are counted from 0)")
    return values


def _kind(delta: Delta) -> str:
    return str(delta.info.get("task", {}).get("kind", "classification"))


def _columns(delta: Delta) -> list[str]:
    """What a text to predict has: of prompt and completion, the prompt."""
    columns = list(delta.info.get("task", {}).get("text") or ["text"])
    return columns if _kind(delta) in ("classification", "regression") else columns[:1]


def _check(texts: Sequence[Text], pairs: Sequence[Text] | None, wanted: int) -> None:
    if not texts:
        raise DataError("there are no texts to predict; give text= or file=")
    if (pairs is not None) != (wanted == 2):
        hint = "give pairs=, or a file= with both columns" if wanted == 2 else "leave out pairs="
        raise DataError(f"the delta's task takes {wanted} text{'s' * (wanted > 1)}; {hint}")
    if pairs is not None and len(pairs) != len(texts):
        raise DataError(f"{len(texts)} texts and {len(pairs)} pairs: they go together one by one")


Sizes = tuple[int, int]  # batch_size, max_new_tokens


def _outputs(
    model: Any, tokenizer: Any, delta: Delta, kind: str, columns: dict[str, Any], size: int
) -> list[tuple[Tensor, Tensor | None]]:
    """Logits and labels of each text, padded as in `fit` and `evaluate`; the labels are the column "labels"."""
    limit = delta.info.get("settings", {}).get("max_length")
    text, label = tuple(name for name in columns if name != "labels"), "labels" if "labels" in columns else None
    encoded = encode(Dataset.from_dict(columns), tokenizer, kind, text, label, limit)
    found: list[Any] = [None] * len(encoded)

    def take(rows: Sequence[int], logits: Tensor, labels: Tensor | None) -> None:
        for i, row in enumerate(rows):
            found[row] = logits[i], None if labels is None else labels[i]

    forwards(model, encoded, Collator.of(tokenizer, kind, model=model), size, take)
    return found


def _classify(
    model: Any, tokenizer: Any, delta: Delta, texts: list[Any], pairs: Sequence[Any] | None, sizes: Sizes
) -> list[Prediction]:
    columns = {"text": texts} if pairs is None else {"text": texts, "pair": list(pairs)}
    seconds: list[Any] = [None] * len(texts) if pairs is None else list(pairs)
    rows = []
    outputs = _outputs(model, tokenizer, delta, "classification", columns, sizes[0])
    for text, pair, (row, _) in zip(map(str, texts), seconds, outputs, strict=True):
        if not delta.labels or len(row) == 1:
            rows.append(Prediction(text, float(row[0]), pair))
        else:
            odds = dict(zip(delta.labels, row.softmax(-1).tolist(), strict=True))
            rows.append(Prediction(text, max(odds, key=lambda label: odds[label]), pair, odds))
    return rows


def _tag(model: Any, tokenizer: Any, delta: Delta, texts: list[Text], pairs: object, sizes: Sizes) -> list[Prediction]:
    """One label per word, words parted by white space; a word's label is its first token's."""
    words = [text.split() if isinstance(text, str) else text for text in texts]
    numbers = [list(range(len(row))) for row in words]
    columns: dict[str, Any] = {"text": words, "labels": numbers}
    rows = []
    outputs = _outputs(model, tokenizer, delta, "tokens", columns, sizes[0])
    for text, row, (logits, labels) in zip(texts, numbers, outputs, strict=True):
        assert labels is not None
        best = zip(labels.tolist(), logits.argmax(-1).tolist(), strict=True)
        found = {word: delta.labels[label] for word, label in best if word != IGNORED}
        said = text if isinstance(text, str) else " ".join(text)
        rows.append(Prediction(said, [found.get(n, "O") for n in row]))
    return rows


def _continue(
    model: Any, tokenizer: Any, delta: Delta, texts: list[Text], pairs: object, sizes: Sizes
) -> list[Prediction]:
    """Greedy continuations, one text at a time; of a conversation, what the assistant says next or said last."""
    chat = tuple(delta.info.get("task", {}).get("text", ())) == ("messages",)
    rows = []
    for text in texts:
        said = text if isinstance(text, list) else [{"role": "user", "content": text}]
        turn = [{k: v for k, v in message.items() if v is not None} for message in said]  # None: of another message
        turn = turn[:-1] if len(turn) > 1 and turn[-1].get("role") == "assistant" else turn
        options = {"tokenize": False, "add_generation_prompt": True}
        prompt = tokenizer.apply_chat_template(turn, **options) if chat else text
        batch = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(model.device)
        batch.pop("token_type_ids", None)
        batch["pad_token_id"] = tokenizer.pad_token_id
        with torch.inference_mode():
            ids = model.generate(**batch, max_new_tokens=sizes[1], do_sample=False)
        answer = tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        rows.append(Prediction(text if isinstance(text, str) else str(turn[-1].get("content", "")), answer))
    return rows
