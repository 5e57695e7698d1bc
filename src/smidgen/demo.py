"""The demo: what LayerNorms alone can do on BBC news, next to a mere head. And `predict`, for new texts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smidgen.attach import attached
from smidgen.data import Task
from smidgen.delta import Delta
from smidgen.errors import DataError
from smidgen.evaluate import evaluate
from smidgen.models import load
from smidgen.plan import resolve
from smidgen.recipe import as_recipe
from smidgen.runs import RUN
from smidgen.train import fit

MODEL, DATA = "minilm", "bbc-news"
LIMIT = {"train": 640, "validation": 100, "test": 300}
SETTINGS: dict[str, Any] = {"epochs": 3, "max_length": 64, "lr": 1e-2, "head_lr": 1e-2}
ARMS = (("LN()", "first"), ("Head()", "first"), ("Head()", "mean"))
INTRO = f"""
    {MODEL} (22.7 million values) learns to sort BBC news into 5 topics from {LIMIT["train"]} articles and is tested
    on {LIMIT["test"]} others: its 13 LayerNorms (9,984 values) and a head are trained, or a head alone.
"""
NOISE = f"With {LIMIT['test']} test articles, differences below about 4 points say little."
SENTENCES = (
    "The striker scored twice in extra time to put the home side into the final.",
    "Shares fell sharply after the bank said that its profits would be lower than expected.",
    "The new phone can record video for three hours and has a better camera.",
)


@dataclass(frozen=True)
class Arm:
    """One arm of the comparison; `seconds` is None if its run was begun earlier."""

    name: str
    accuracy: float
    trained: int
    head: int
    file_bytes: int
    seconds: float | None


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


@dataclass(frozen=True)
class Demonstration:
    """What the demo shows: the arms, and predictions by the LN delta that was read back from disk."""

    arms: list[Arm]
    predictions: list[Prediction]
    remark: str = NOISE

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def demo(out: str | os.PathLike[str], say: Callable[[str], None] = print) -> Demonstration:
    """Train the arms on a part of BBC news, LN's delta into `out`; load that from disk and use it.

    Args:
        out: folder of LN's run; a demo that was stopped goes on there.
        say: gets a line before each arm.
    """
    task = Task.load(DATA, limit=LIMIT)
    model, tokenizer = load(MODEL, task=task)
    arms = []
    for recipe, pooling in ARMS:
        say(f"training {recipe}, pooling {pooling} ...")
        arms.append(_arm(model, task, recipe, pooling, out if recipe == "LN()" else None))
    delta = Delta.load(out)
    base, tokenizer = load(MODEL, delta=delta)
    return Demonstration(arms, predict(base, SENTENCES, delta=delta, tokenizer=tokenizer))


def _arm(model: PreTrainedModel, task: Task, recipe: str, pooling: str, out: str | os.PathLike[str] | None) -> Arm:
    plan = resolve(model, as_recipe(recipe), pooling)
    begun = out is not None and (Path(out) / RUN).exists()
    start = time.perf_counter()
    delta = fit(model, recipe, task, out=out, pooling=pooling, **SETTINGS)
    seconds = None if begun else time.perf_counter() - start
    accuracy = evaluate(model, task, delta=delta).values["accuracy"]
    return Arm(f"{recipe}, {pooling}", accuracy, plan.trained, plan.head_values, plan.file_bytes, seconds)


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
