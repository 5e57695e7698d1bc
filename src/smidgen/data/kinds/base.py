"""TaskKind: all that is asked of a kind of task, in one class. Defining a subclass registers it under its name."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, cast

import torch
from datasets import Dataset, Value
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.common.errors import DataError, nearest
from smidgen.data.columns import Columns, check_inputs
from smidgen.data.encoded import Cells, Column, Encoded, Example, tokens_of
from smidgen.data.labels import IGNORED, LabelPlace, Labels
from smidgen.data.metrics import METRICS, Metric
from smidgen.data.processor import Processor, tokenizer_in
from smidgen.data.readers import Raw

Batch = dict[str, Tensor]
Collate = Callable[[list[Example]], Batch]
Run = Callable[[Cells], list[tuple[Tensor, Tensor | None]]]
Pair = tuple[object, object]  # what a metric takes: prediction, reference


class Outputs(Protocol):
    """What a model says of a batch."""

    logits: Tensor
    loss: Tensor | None


class _Generating(Protocol):
    """A model that writes."""

    def generate(self, **options: object) -> Tensor: ...


@dataclass(frozen=True)
class Question:
    """New inputs to answer, and what they are answered with.

    Attributes:
        inputs: one each, and `seconds` the other one for kinds that take two.
        columns: the task's input columns.
        names: label names in id order.
        run: columns of inputs, by any names, and perhaps "labels" -> logits of each, in float32, and its labels.
        model, processor, max_new_tokens, max_length, batch_size: for kinds that encode or generate themselves.
    """

    inputs: Column
    seconds: Column | None
    columns: tuple[str, ...]
    names: tuple[str, ...]
    run: Run
    model: PreTrainedModel
    processor: Processor
    max_new_tokens: int
    max_length: int | None = None
    batch_size: int = 64


@dataclass(frozen=True)
class Answer:
    """What a model says about one input: the input in words, the answer, and label -> probability where there are."""

    text: str
    answer: object
    probabilities: Mapping[str, float] = field(default_factory=dict)


class TaskKind:
    """A kind of task: how its data is read, what a batch is, what a model's outputs say, and how they are scored.

    One object without state for each class, in `registry` by its name. What a subclass has to say is `name`,
    `model_class`, `metrics`, `usual`, `columns`, `encode`, `collator` and `pairs`, which is checked when it is defined;
    the rest has a meaning that fits one label for each example.

    Class attributes:
        name: what `kind=` and files say.
        model_class: name of a class of transformers that `smidgen.load` takes.
        processor_class: name of the class of transformers that makes its inputs.
        metrics: all that fit.
        usual: names of those that are always reported; the first decides unless another is chosen.
        written: those of `metrics` that take what the model writes, (text, right texts), by `write`.
        labels_at: what a batch's labels belong to.
        label_dtype: of a batch's labels, one for each example; None for labels at positions.
        normal: labels are numbers with a normal distribution around the model's output, not classes.
        uncountable: what a sum over all labels would run over, where that is too much ("label sequences").
        improbable: why one example's labels have no probability of their own, where that is so.
        couples_batch: the loss of an example depends on the others of its batch, which then cannot be cut into parts.
        passes: rows that the model computes for each example.
        unsteered: why a forward pass cannot start at the lowest edit, or compute one row of the last block, for it.
        many_per_row: a row makes several examples, or none.
        stratified: a validation split is cut off label by label.
        reads_prose, reads_tagged: running text, and words with their tags line by line, are of this kind.
        unpackable: why examples cannot share a row; None if they can.
        general: claims whatever has a label, so that it is asked last.
        converses: an input may be a conversation, which `smidgen chat` goes on with.
        samples: how many examples a run's report shows with what is written of them, before and after.
        plain_cells: `encode` reads slices of columns and nothing else of a Dataset, so new inputs need not be one.
    """

    registry: ClassVar[dict[str, TaskKind]] = {}
    name: ClassVar[str]
    model_class: ClassVar[str]
    processor_class: ClassVar[str] = "AutoTokenizer"
    metrics: ClassVar[tuple[Metric, ...]]
    usual: ClassVar[tuple[str, ...]]
    written: ClassVar[tuple[Metric, ...]] = ()
    labels_at: ClassVar[LabelPlace] = LabelPlace.EXAMPLE
    label_dtype: ClassVar[torch.dtype | None] = torch.long
    normal: ClassVar[bool] = False
    uncountable: ClassVar[str | None] = None
    improbable: ClassVar[str | None] = None
    couples_batch: ClassVar[bool] = False
    passes: ClassVar[int] = 1
    unsteered: ClassVar[str | None] = None
    many_per_row: ClassVar[bool] = False
    stratified: ClassVar[bool] = False
    reads_prose: ClassVar[bool] = False
    reads_tagged: ClassVar[bool] = False
    unpackable: ClassVar[str | None] = "its examples are no runs of tokens"
    general: ClassVar[bool] = False
    converses: ClassVar[bool] = False
    samples: ClassVar[int] = 0
    plain_cells: ClassVar[bool] = False

    def __init_subclass__(cls, abstract: bool = False, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if abstract:
            return
        name = cls.__dict__.get("name")
        if not name or not (cls.__dict__.get("__doc__") or "").strip():
            raise TypeError(f"{cls.__name__} needs a name, for kind=, and a docstring")
        lacking = [each for each in dir(cls) if getattr(getattr(cls, each), "__isabstractmethod__", False)]
        lacking += [each for each in ("model_class", "metrics", "usual") if not hasattr(cls, each)]
        if lacking:
            raise TypeError(f"{cls.__name__}, a kind of task, does not define {', '.join(lacking)}")
        known = TaskKind.registry.get(name)
        if known is not None and type(known).__qualname__ != cls.__qualname__:
            raise TypeError(f"two kinds of task are named {name!r}: {type(known).__name__} and {cls.__name__}")
        for metric in cls.metrics:
            if METRICS.setdefault(metric.name, metric).function is not metric.function:
                raise TypeError(f"two metrics are named {metric.name!r}, one of them of the kind {name!r}")
        TaskKind.registry[name] = cls()

    # Reading

    def read(self, path: Path, seed: int) -> Raw | None:
        """Splits of a file or folder of a form that only this kind has; None if this is none.

        Raises:
            DataError: it is one, and cannot be read.
        """
        return None

    def claims(self, rows: Dataset, text: Sequence[str] | None, label: str | None) -> Columns | None:
        """The columns, if what is there tells that it is of this kind; None if not. Asked where no kind is given."""
        return None

    @abstractmethod
    def columns(self, rows: Dataset, text: Sequence[str] | None, label: str | None) -> Columns:
        """Which columns are inputs and label: what is given, and the rest by known names.

        Raises:
            DataError: none, or more than one, could be meant; a column of another type.
        """

    def inputs(self, rows: Dataset, split: str, columns: Columns) -> Dataset:
        """The input columns as the task keeps them. Raises DataError if one is missing, or empty in a row."""
        check_inputs(rows, split, columns)
        return rows.select_columns(list(columns.text))

    def label_set(self, rows: Dataset, columns: Columns) -> Labels:
        """The labels that occur in the split to learn from; none where labels are no names."""
        return Labels()

    def label_ids(self, rows: Dataset, split: str, columns: Columns, labels: Labels) -> Sequence[object]:
        """The label column as ids or numbers. Raises DataError if a label is missing or unknown."""
        raise DataError(f"a {self.name} task has no label column: leave out label={columns.label!r}")

    def label_feature(self) -> object:
        """The type of that column in the task's splits."""
        return Value("int64")

    def keys(self, rows: Dataset, columns: Columns) -> list[list[str]]:
        """Text that tells each row's inputs: rows with the same text stay in one split."""
        texts = [rows[name][:] for name in columns.text]
        return [[v if isinstance(v, str) else json.dumps(v) for v in row] for row in zip(*texts, strict=True)]

    def digest(self, row: Mapping[str, object]) -> bytes:
        """A row's content, for the task's fingerprint."""
        return json.dumps(row, sort_keys=True, default=str).encode()

    # Batches

    def width(self, labels: Sequence[str]) -> int | None:
        """Values that the head gives for each label; None if the task does not tell."""
        return len(labels)

    @abstractmethod
    def encode(
        self, rows: Dataset, processor: Processor, text: Sequence[str], label: str | None, max_length: int | None
    ) -> Encoded:
        """The examples of a split; the column `label` holds ids or numbers, None for inputs alone.

        Raises:
            DataError: the processor is of another kind, or the length leaves no room.
        """

    @abstractmethod
    def collator(self, processor: Processor, multiple: int = 1, model: nn.Module | None = None) -> Collate:
        """Makes a batch of examples, "labels" among its tensors if they have any.

        Raises:
            DataError: the processor is of another kind, or does not fit the model.
        """

    def length(self, example: Mapping[str, object]) -> int:
        """Size of an example, by which those of a batch are put together."""
        return len(tokens_of(example)) if "input_ids" in example else 0

    def parted(self, batch: Mapping[str, Tensor]) -> tuple[Batch, Tensor | None]:
        """A batch as inputs and labels, which are None if it has none."""
        inputs = dict(batch)
        return inputs, inputs.pop("labels", None)

    def loss_weights(self, batch: Mapping[str, Tensor], rows: int) -> list[int]:
        """What each row contributes to the mean that the loss is: 1, or the number of its labels."""
        labels = batch.get("labels")
        if self.labels_at is LabelPlace.EXAMPLE or labels is None or labels.ndim != 2:
            return [1] * rows
        return list((self.aligned(labels, labels)[1] != IGNORED).sum(1).tolist())

    # The model

    def head_options(self, labels: Sequence[str]) -> dict[str, object]:
        """Options of `from_pretrained` that shape the head."""
        names = dict(enumerate(labels))
        return {"id2label": names, "label2id": {name: i for i, name in names.items()}} if labels else {}

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Outputs:
        """The model's outputs: `logits`, and `loss` if the batch has labels."""
        outputs: Outputs = model(**batch)
        return outputs

    def model_inputs(self, batch: Mapping[str, Tensor]) -> Batch:
        """What `forward` calls the model with; of several calls, with the first."""
        return dict(batch)

    # Outputs

    @abstractmethod
    def pairs(self, outputs: Outputs, labels: Tensor | None, names: Sequence[str]) -> Sequence[Pair]:
        """(prediction, reference) of each example of a batch, as metrics take them; reference None without labels.

        Args:
            outputs: of `forward`, `logits` in float32.
            names: label names in id order.
        """

    def told(self, pair: Pair, example: Mapping[str, object]) -> Pair:
        """A pair of `pairs` as metrics take it, for kinds that need the example beside it."""
        return pair

    def by_row(self, pairs: Sequence[Pair]) -> Sequence[Pair]:
        """A split's pairs, one for each thing that is scored, from those of all its examples, in their order.

        For kinds that make several examples of a row and score the row.
        """
        return pairs

    def write(self, model: nn.Module, batch: Batch, processor: Processor, max_new_tokens: int) -> list[str]:
        """The text that a model writes for each example of a batch, greedily or by the beams of its own settings."""
        raise DataError(f"a {self.name} task has its model write nothing")

    def right_texts(self, example: Mapping[str, object], processor: Processor) -> list[str]:
        """The right texts of an example, which metrics of `written` compare with what the model writes."""
        return cast("list[str]", example["right_texts"])

    def asked_text(self, example: Mapping[str, object], processor: Processor) -> str:
        """What the model reads of an example before it writes."""
        return str(tokenizer_in(processor, self.name).decode(list(tokens_of(example)), skip_special_tokens=True))

    def aligned(self, values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Values, such as logits (B, [T,] C), and labels so that both are (B, N, ...) and position n is of label n."""
        if self.labels_at is LabelPlace.EXAMPLE:
            return values[:, None], labels[:, None]
        if self.labels_at is LabelPlace.NEXT:
            return values[:, :-1], labels[:, 1:]
        return values, labels

    # Prediction

    def asked(self, columns: Sequence[str]) -> tuple[str, ...]:
        """Those of a task's input columns that a new input has."""
        return tuple(columns)

    def read_inputs(self, path: Path) -> Column | None:
        """New inputs from a file or folder of a form that only this kind has; None to read rows or lines."""
        return None

    def cell_type(self, columns: Sequence[str]) -> type:
        """Type of a cell of an input column: str, or list."""
        return str

    def answers(self, question: Question) -> list[Answer]:
        """What a model says about new inputs. Raises DataError if the kind answers none."""
        raise DataError(f"{type(self).__name__} does not say how a {self.name} task answers new inputs")


def kind_named(name: str) -> TaskKind:
    """The registered kind of a name. Raises DataError if there is none."""
    if name not in TaskKind.registry:
        known = TaskKind.registry
        raise DataError(f"unknown kind {name!r}; there are {', '.join(known)}{nearest(str(name), known)}")
    return TaskKind.registry[name]


def generated(model: nn.Module, batch: Mapping[str, Tensor], max_new_tokens: int, **options: object) -> Tensor:
    """Ids (B, T) that a model writes for encoded texts, without sampling; `options` of its `generate`."""
    device = next(model.parameters()).device
    inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        found = cast(_Generating, model).generate(**inputs, **options, max_new_tokens=max_new_tokens, do_sample=False)
    return found


def written_texts(
    kind: TaskKind,
    model: nn.Module,
    encoded: Sequence[Example],
    processor: Processor,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """What a model writes for each example, in their order; batches go by length."""
    collate, found = kind.collator(processor, model=model), dict[int, str]()
    order = sorted(range(len(encoded)), key=lambda i: kind.length(encoded[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([encoded[i] for i in rows])
        found.update(zip(rows, kind.write(model, batch, processor, max_new_tokens), strict=True))
    return [found[row] for row in range(len(encoded))]


def named_columns(question: Question) -> Cells:
    """The inputs of a question as columns for `Question.run`."""
    seconds = {} if question.seconds is None else {"pair": question.seconds}
    return {"text": question.inputs, **seconds}


def label_answers(question: Question, shown: Sequence[str], columns: Cells | None = None) -> list[Answer]:
    """The most probable label of each input, with all probabilities; without names the number that is given.

    Args:
        shown: the inputs in words.
        columns: of the inputs, as `Question.run` takes them; by default as they are asked.
    """
    found = []
    outputs = question.run(named_columns(question) if columns is None else columns)
    for text, (row, _) in zip(shown, outputs, strict=True):
        if not question.names or len(row) == 1:
            found.append(Answer(text, float(row[0])))
        else:
            odds = dict(zip(question.names, row.softmax(-1).tolist(), strict=True))
            found.append(Answer(text, max(odds, key=lambda label: odds[label]), odds))
    return found


def class_pairs(logits: Tensor, labels: Tensor | None) -> Sequence[Pair]:
    """(id predicted, id) of each example; logits: (B, C)."""
    predicted = logits.argmax(-1).tolist()
    references = [None] * len(predicted) if labels is None else labels.tolist()
    return list(zip(predicted, references, strict=True))
