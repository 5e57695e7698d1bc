"""predict: what a model with a delta says about new texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smidgen.attach import attached
from smidgen.delta import Delta
from smidgen.errors import DataError


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
    texts: Sequence[str],
    *,
    delta: Delta,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[str] | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 64,
) -> list[Prediction]:
    """What a delta's model says about new texts: labels, numbers, or continuations of a causal LM.

    Args:
        pairs: the second text of each, for tasks of two texts.

    Raises:
        DataError: no texts, or the task takes two texts and got one, or the other way round.
    """
    wanted = len(delta.info.get("task", {}).get("text", ("text",)))
    kind = delta.info.get("task", {}).get("kind", "classification")
    _check(texts, pairs, wanted if kind in ("classification", "regression") else 1)
    answer = {"causal-lm": _continue, "tokens": _tag}.get(kind, _classify)
    rows: list[Prediction] = []
    with attached(model, delta), torch.inference_mode():
        for i in range(0, len(texts), batch_size):
            second = None if pairs is None else list(pairs[i : i + batch_size])
            rows += answer(model, tokenizer, delta, list(texts[i : i + batch_size]), second, max_new_tokens)
    return rows


def read_texts(path: Path, delta: Delta) -> tuple[list[str], list[str] | None]:
    """Texts, and their pairs if there are, from a .jsonl file with the task's columns, or one per line.

    Raises:
        DataError: the file cannot be read, or a row lacks a column.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path.suffix != ".jsonl":
            return lines, None
        columns = delta.info.get("task", {}).get("text") or ["text"]
        rows = [[str(json.loads(line)[column]) for column in columns] for line in lines]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except KeyError as error:
        raise DataError(f"a row of {path} has no column {error}; the task has {', '.join(columns)}") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    return [row[0] for row in rows], [row[1] for row in rows] if len(columns) == 2 else None


def _check(texts: Sequence[str], pairs: Sequence[str] | None, wanted: int) -> None:
    if not texts:
        raise DataError("there are no texts to predict")
    if (pairs is not None) != (wanted == 2):
        hint = "give --pair for each" if wanted == 2 else "leave out the pairs"
        raise DataError(f"the delta's task takes {wanted} text{'s' * (wanted > 1)}; {hint}")
    if pairs is not None and len(pairs) != len(texts):
        raise DataError(f"{len(texts)} texts and {len(pairs)} pairs: they go together one by one")


def _limit(tokenizer: Any, delta: Delta) -> int:
    return delta.info.get("settings", {}).get("max_length") or min(tokenizer.model_max_length, 512)


def _classify(
    model: Any, tokenizer: Any, delta: Delta, texts: list[str], pairs: list[str] | None, _: int
) -> Iterator[Prediction]:
    options = {"truncation": True, "max_length": _limit(tokenizer, delta), "padding": True}
    batch = tokenizer(texts, pairs, return_tensors="pt", **options)
    logits = model(**batch.to(model.device)).logits.float()
    seconds: list[Any] = [None] * len(texts) if pairs is None else list(pairs)
    for text, pair, row in zip(texts, seconds, logits, strict=True):
        if not delta.labels or len(row) == 1:
            yield Prediction(text, float(row[0]), pair)
        else:
            odds = dict(zip(delta.labels, row.softmax(-1).tolist(), strict=True))
            yield Prediction(text, max(odds, key=lambda label: odds[label]), pair, odds)


def _tag(model: Any, tokenizer: Any, delta: Delta, texts: list[str], pairs: object, _: int) -> Iterator[Prediction]:
    """One label per word, words parted by white space; a word's label is its first token's."""
    words = [text.split() for text in texts]
    options = {"truncation": True, "max_length": _limit(tokenizer, delta), "is_split_into_words": True}
    batch = tokenizer(words, padding=True, return_tensors="pt", **options)
    best = model(**batch.to(model.device)).logits.argmax(-1).tolist()
    for i, text in enumerate(texts):
        labels: dict[int, str] = {}
        for word, label in zip(batch.word_ids(i), best[i], strict=True):
            if word is not None:
                labels.setdefault(word, delta.labels[label])
        yield Prediction(text, [labels.get(n, "O") for n in range(len(words[i]))])


def _continue(
    model: Any, tokenizer: Any, delta: Delta, texts: list[str], pairs: object, new: int
) -> Iterator[Prediction]:
    """Greedy continuations, one text at a time."""
    chat = tuple(delta.info.get("task", {}).get("text", ())) == ("messages",)
    for text in texts:
        turn = [{"role": "user", "content": text}]
        options = {"tokenize": False, "add_generation_prompt": True}
        prompt = tokenizer.apply_chat_template(turn, **options) if chat else text
        batch = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(model.device)
        batch.pop("token_type_ids", None)
        batch["pad_token_id"] = tokenizer.pad_token_id
        ids = model.generate(**batch, max_new_tokens=new, do_sample=False)
        answer = tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        yield Prediction(text, answer)
