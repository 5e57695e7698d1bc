"""The examples that a score is taken over: a seeded choice of a split, in batches by length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from smidgen.common.errors import DataError
from smidgen.data.encoded import Example
from smidgen.data.kinds.base import Batch, Collate, TaskKind, kind_named
from smidgen.data.processor import Processor
from smidgen.data.splits import first
from smidgen.data.task import Task


@dataclass(frozen=True)
class Sample:
    """Examples with labels, and how they make a batch.

    Attributes:
        kind: name of the task's kind: "classification", "regression", "tokens", "causal-lm", ...
        examples: one dict each.
        collate: examples -> a batch of tensors, "labels" among them.
        numbers: number of each example in its split.
        split: name of the split, for messages.
        width: values that the model's head should give, None if that is not known.
    """

    kind: str
    examples: Sequence[Example] = field(repr=False)
    collate: Collate = field(repr=False)
    numbers: Sequence[int] = field(repr=False)
    split: str = "the batch"
    width: int | None = None

    @classmethod
    def of_task(
        cls,
        task: Task,
        processor: Processor,
        split: str = "train",
        examples: int = 1024,
        seed: int = 0,
        max_length: int | None = None,
        model: nn.Module | None = None,
    ) -> Sample:
        """A seeded choice of a split's examples, padded as `model` reads them; all of them if there are fewer.

        Raises:
            DataError: no such split, no labels, or `examples` is below 1.
        """
        if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
            raise DataError(f"examples={examples!r} must be a whole number of at least 1")
        rows = task.split(split)
        kind = task.task_kind
        if kind.many_per_row:
            encoded = kind.encode(rows, processor, task.text, task.label, max_length)
            numbers = first(len(encoded), examples, seed)
            chosen: Sequence[Example] = [encoded[i] for i in numbers]
        else:
            numbers = first(len(rows), examples, seed)
            chosen = kind.encode(rows.select(numbers), processor, task.text, task.label, max_length)
        collate = task.collator(processor, model=model)
        return cls(task.kind, chosen, collate, numbers, split, kind.width(task.labels))

    @classmethod
    def of_batch(cls, batch: Mapping[str, Tensor], kind: str) -> Sample:
        """The rows of one batch of tensors, such as pixel_values (N, 3, H, W) and labels (N,)."""
        count = len(batch["labels"])
        examples: list[Example] = [{key: value[i] for key, value in batch.items()} for i in range(count)]
        return cls(kind, examples, _stack, range(count))

    def __len__(self) -> int:
        return len(self.examples)

    def batches(self, size: int) -> Iterator[list[int]]:
        """Places of the examples of each batch; short ones first, so that little is padded."""
        order = sorted(range(len(self)), key=lambda i: self.task_kind.length(self.examples[i]))
        yield from (order[i : i + size] for i in range(0, len(order), size))

    def batch(self, places: Sequence[int], device: torch.device) -> tuple[Batch, Tensor]:
        """The model's inputs, and the labels, on a device."""
        batch = {k: v.to(device) for k, v in self.collate([self.examples[i] for i in places]).items()}
        inputs, labels = self.task_kind.parted(batch)
        if labels is None:
            raise DataError(f"the examples of {self.split} have no labels to take a score over")
        return inputs, labels

    @property
    def task_kind(self) -> TaskKind:
        """What is known of the task's kind."""
        return kind_named(self.kind)

    def name(self, place: int) -> str:
        """The example in words."""
        return f"example {self.numbers[place]} of {self.split}"


def _stack(examples: list[Example]) -> Batch:
    rows = cast("list[Batch]", examples)
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
