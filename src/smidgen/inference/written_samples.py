"""What a model writes for a few examples of a split, without and with a delta."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import nn

from smidgen.common.errors import DataError
from smidgen.common.module_modes import evaluating
from smidgen.data.kinds.base import written_texts
from smidgen.data.processor import Processor
from smidgen.data.task import Task
from smidgen.delta.attaching import attached
from smidgen.delta.delta import Delta
from smidgen.inference.processors import processor_of
from smidgen.inference.task_record import TaskRecord


@dataclass(frozen=True)
class WrittenSample:
    """An example with what is written of it.

    Attributes:
        asked: what the model reads.
        right: the right text.
        before, after: what the base writes, and what it writes with the delta.
    """

    asked: str
    right: str
    before: str
    after: str


def write_samples(
    model: nn.Module,
    task: Task,
    delta: Delta,
    *,
    split: str = "validation",
    count: int = 4,
    processor: Processor | None = None,
    max_new_tokens: int = 64,
) -> list[WrittenSample]:
    """What a base and its delta write, greedily, for the first examples of a split.

    Raises:
        DataError: the task lacks the split, or its kind has a model write nothing.
    """
    kind, shown = task.task_kind, max(1, count)
    if not kind.written:
        raise DataError(f"a {kind.name} task has its model write nothing, so there are no samples of it")
    processor = processor or processor_of(model, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what was cut has been told when the run began
        encoded = task.encode(processor, split, max_length=TaskRecord.of(delta.info).max_length)
    examples = list(encoded[:shown])
    with evaluating(model):
        before = written_texts(kind, model, examples, processor, shown, max_new_tokens)
        with attached(model, delta):
            after = written_texts(kind, model, examples, processor, shown, max_new_tokens)
    return [
        WrittenSample(kind.asked_text(example, processor), kind.right_texts(example, processor)[0], one, other)
        for example, one, other in zip(examples, before, after, strict=True)
    ]
