"""predict: what a model with a delta says about new inputs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from smidgen.common.errors import DataError
from smidgen.common.wrappers import bare
from smidgen.data.conll import is_tagged
from smidgen.data.encoded import CellRows, Cells, Column, Encoded
from smidgen.data.kinds.base import Outputs, Question, Run, TaskKind
from smidgen.data.processor import Processor, given_processor
from smidgen.data.readers import FORMATS, decode, read_rows
from smidgen.delta.attaching import attached
from smidgen.delta.delta import Delta
from smidgen.inference.forward_pass import forwards
from smidgen.inference.processors import processor_of
from smidgen.inference.task_record import TaskRecord

Text = str | Column  # a list of words (tokens), or of messages


@dataclass(frozen=True)
class Prediction:
    """What a model says about one input.

    Attributes:
        text: the input; of an image or a sound, its name.
        answer: label name, number, labels of the words, or the continuation.
        pair: the second text, for tasks of two.
        probabilities: label -> probability, for classification.
    """

    text: str
    answer: object
    pair: str | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The answer as text."""
        return str(self.answer)


def predict(  # noqa: PLR0913 - options by keyword
    model: PreTrainedModel,
    texts: Sequence[object],
    *,
    delta: Delta,
    processor: Processor | None = None,
    tokenizer: Processor | None = None,
    pairs: Sequence[Text] | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 64,
) -> list[Prediction]:
    """What a delta's model says about new inputs: labels, numbers, or continuations of a causal LM.

    Args:
        texts: strings; for tokens also lists of words, else parted by white space; for chats also lists of messages.
        processor: makes the model's inputs, by default the one of its name; `tokenizer` is another name of it.
        pairs: the second text of each, for tasks of two texts.

    Raises:
        DataError: no texts, or the task takes two texts and got one, or the other way round.
    """
    model, task = bare(model), TaskRecord.of(delta.info)
    processor = given_processor(processor, tokenizer) or processor_of(model, task.task_kind)
    check_texts(texts, pairs, task.asked)
    seconds, limit = None if pairs is None else list(pairs), task.max_length
    run = _running(model, processor, task, batch_size)
    question = Question(
        list(texts), seconds, task.columns, delta.labels, run, model, processor, max_new_tokens, limit, batch_size
    )
    with attached(model, delta):
        return answers_to(task.task_kind, question)


def answers_to(kind: TaskKind, question: Question) -> list[Prediction]:
    """A kind's answers to a question, beside the inputs."""
    answers = kind.answers(question)
    shown: Column = [None] * len(answers) if question.seconds is None else question.seconds
    each = zip(answers, shown, strict=True)
    return [Prediction(answer.text, answer.answer, pair, answer.probabilities) for answer, pair in each]


def read_texts(path: Path, delta: Delta) -> tuple[Column, Column | None]:
    """Inputs of a file, and their pairs if the task has two.

    From rows (.csv .tsv .json .jsonl .parquet) come the task's input columns, from words with tags (.conll and the
    like, also named .txt) the words; of any other file each line is a text, blank ones apart.

    Raises:
        DataError: the file cannot be read or has not got the columns, or a row has no text.
    """
    task = TaskRecord.of(delta.info)
    kind = task.task_kind
    columns, own = kind.asked(task.columns), kind.read_inputs(path)
    if own is not None:
        return own, None
    suffix = path.suffix.lower()
    if FORMATS.get(suffix, "text") == "text":
        text = decode(path)
        if not (kind.reads_tagged and is_tagged(text)):
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
    texts = [_texts(path, name, rows[name][:], kind.cell_type(columns)) for name in columns]
    return texts[0], texts[1] if len(texts) == 2 else None


def _texts(path: Path, name: str, values: Column, wanted: type) -> list[Text]:
    for row, value in enumerate(values):
        if not value or not isinstance(value, wanted):
            found = "empty" if not value else f"{str(value)[:40]!r}"
            what = "a text" if wanted is str else "a list"
            raise DataError(f"{path} row {row}: column {name!r} is {found}, not {what} (rows are counted from 0)")
    return values


def check_texts(texts: Sequence[object], pairs: Sequence[object] | None, wanted: int) -> None:
    """Raises DataError if there is no input, or if inputs do not have the number of texts that a task takes."""
    if not texts:
        raise DataError("there are no texts to predict; give text= or file=")
    if (pairs is not None) != (wanted == 2):
        hint = "give pairs=, or a file= with both columns" if wanted == 2 else "leave out pairs="
        raise DataError(f"the delta's task takes {wanted} text{'s' * (wanted > 1)}; {hint}")
    if pairs is not None and len(pairs) != len(texts):
        raise DataError(f"{len(texts)} texts and {len(pairs)} pairs: they go together one by one")


def encode_inputs(columns: Cells, task: TaskRecord, processor: Processor) -> Encoded:
    """New inputs as a kind encodes its examples; the column "labels", if there is one, as labels."""
    kind = task.task_kind
    names, label = tuple(name for name in columns if name != "labels"), "labels" if "labels" in columns else None
    rows = CellRows(columns) if kind.plain_cells else Dataset.from_dict(columns)
    return kind.encode(cast(Dataset, rows), processor, names, label, task.max_length)


def _running(model: PreTrainedModel, processor: Processor, task: TaskRecord, size: int) -> Run:
    """Logits and labels of each input, padded as in `fit` and `evaluate`; the labels are the column "labels"."""
    kind = task.task_kind

    def run(columns: Cells) -> list[tuple[Tensor, Tensor | None]]:
        encoded = encode_inputs(columns, task, processor)
        found: dict[int, tuple[Tensor, Tensor | None]] = {}

        def take(rows: Sequence[int], outputs: Outputs, labels: Tensor | None) -> None:
            for i, row in enumerate(rows):
                found[row] = outputs.logits[i], None if labels is None else labels[i]

        forwards(model, encoded, kind, kind.collator(processor, model=model), size, take)
        return [found[row] for row in range(len(encoded))]

    return run
