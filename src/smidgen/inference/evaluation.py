"""Run a model over a split: one output per example, and the task's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from torch import nn

from smidgen.common.errors import DataError
from smidgen.common.module_modes import evaluating
from smidgen.data.encoded import Example
from smidgen.data.kinds.base import Pair, written_texts
from smidgen.data.metrics import METRICS
from smidgen.data.processor import Processor, given_processor
from smidgen.data.scoring import compute_metric, default_metric
from smidgen.data.task import Task
from smidgen.delta.attaching import attached
from smidgen.delta.delta import Delta
from smidgen.inference.forward_pass import run_examples
from smidgen.inference.processors import processor_of
from smidgen.inference.task_record import TaskRecord

NEW_TOKENS = 128


@dataclass(frozen=True)
class Scores:
    """Metrics of one split and what they were computed from.

    Attributes:
        metric: name of the task's own metric.
        values: metric name -> number.
        predictions, references: per example, as its kind of task has them: label id, float, label names per token,
            nll and tokens; where the metric reads what the model writes, that and the right texts.
        truncated: examples longer than the model takes.
    """

    metric: str
    values: dict[str, float]
    predictions: list[object] = field(repr=False)
    references: list[object] = field(repr=False)
    truncated: int = 0

    @property
    def value(self) -> float:
        """The task's own metric."""
        return self.values[self.metric]

    @property
    def better(self) -> float:
        """The same, turned so that more is better."""
        return self.value if METRICS[self.metric].higher_is_better else -self.value


def evaluate(  # noqa: PLR0913 - options by keyword
    model: nn.Module,
    task: Task,
    *,
    delta: Delta | None = None,
    split: str = "test",
    processor: Processor | None = None,
    tokenizer: Processor | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
) -> Scores:
    """Metrics of a model, with a delta attached for the time, on a split of a task.

    Args:
        delta: attached for the time, in eval mode; None for the model as it is.
        split: of the task.
        processor: makes the model's inputs, by default the one of its name; `tokenizer` is another name of it.
        batch_size: in examples.
        max_length: in tokens; by default what the delta was trained with, else what the model takes.
        max_new_tokens: of what the model writes, for metrics such as BLEU; by default what the delta was trained with,
            else 128.

    Raises:
        DataError: the task lacks the split, or its labels, or has other labels than the delta.
        DeltaError: the delta belongs to another base.
    """
    unnamed = delta is not None and all(name == f"LABEL_{i}" for i, name in enumerate(delta.labels))
    if delta is not None and not unnamed and tuple(task.labels) != delta.labels:
        raise DataError(
            f"the data has the labels {', '.join(task.labels) or 'none'}; "
            f"the delta was trained on {', '.join(delta.labels)}"
        )
    processor = given_processor(processor, tokenizer) or processor_of(model, task.task_kind)
    if delta is not None:
        record = TaskRecord.of(delta.info)
        max_length, max_new_tokens = max_length or record.max_length, max_new_tokens or record.max_new_tokens
    encoded = task.encode(processor, split, max_length=max_length)
    with attached(model, delta) if delta is not None else nullcontext():
        outputs = run_examples(model, encoded, task, processor, batch_size)
        written = write_examples(model, encoded, task, processor, batch_size, max_new_tokens or NEW_TOKENS)
    return compute_scores(task, outputs, written, encoded.truncated)


def write_examples(
    model: nn.Module,
    encoded: Sequence[Example],
    task: Task,
    processor: Processor,
    batch_size: int,
    max_new_tokens: int,
) -> list[Pair]:
    """(text that the model writes, right texts) of each example, in eval mode; none if the metric does not read it."""
    if METRICS[task.metric] not in task.task_kind.written:
        return []
    with evaluating(model):
        texts = written_texts(task.task_kind, model, encoded, processor, batch_size, max_new_tokens)
    kind = task.task_kind
    return [(text, kind.right_texts(example, processor)) for text, example in zip(texts, encoded, strict=True)]


def compute_scores(task: Task, outputs: Sequence[Pair], written: Sequence[Pair] = (), truncated: int = 0) -> Scores:
    """Metrics from (prediction, reference) pairs in the order of the split.

    Args:
        outputs: of the model's outputs.
        written: of what the model writes, if the task's metric reads that.
    """
    outputs = task.task_kind.by_row(outputs)
    predictions, references = [p for p, _ in outputs], [r for _, r in outputs]
    if not written:
        values = compute_metric(task.kind, task.metric, predictions, references, task.labels)
        return Scores(task.metric, values, predictions, references, truncated)
    beside = compute_metric(task.kind, default_metric(task.kind), predictions, references, task.labels)
    predictions, references = [p for p, _ in written], [r for _, r in written]
    value = METRICS[task.metric].function(predictions, references)
    return Scores(task.metric, {task.metric: value, **beside}, predictions, references, truncated)
