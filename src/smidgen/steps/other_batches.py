"""Batches of other data beside those that are trained on: a function of the run's seed and the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from smidgen.common.devices import carried
from smidgen.common.errors import TrainError
from smidgen.data.batching import ShuffledBatches
from smidgen.data.encoded import Encoded
from smidgen.data.kinds.base import Batch, Collate, TaskKind
from smidgen.data.processor import Processor
from smidgen.data.task import Task
from smidgen.steps.step import Batches


@dataclass(frozen=True)
class Source:
    """How a run reads data."""

    seed: int
    batch_size: int
    max_length: int | None
    device: torch.device


@dataclass(frozen=True, eq=False)
class OtherBatches:
    """One batch for each step, epoch after epoch, each shuffled anew."""

    rows: Encoded
    collate: Collate
    kind: TaskKind
    size: int
    labelled: bool
    aligned: bool
    source: Source

    @classmethod
    def of(cls, wanted: Batches, own: Task, processor: Processor, model: nn.Module, source: Source) -> OtherBatches:
        """The batches of a split.

        Raises:
            TrainError: the task is of another kind than the run's, the split holds nothing, or its rows are to be
                partners of those that are trained on and are not as many.
            DataError: there is no such split.
        """
        task = wanted.task or own
        if task.kind != own.kind:
            raise TrainError(f"the objective's batches are of a {task.kind} task, and the run trains on {own.kind}")
        rows = task.encode(processor, wanted.split, max_length=source.max_length)
        if not len(rows):
            raise TrainError(f"the objective's batches are empty: the {wanted.split} split of {task.name}")
        if wanted.aligned:
            _check_aligned(rows, own.encode(processor, "train", max_length=source.max_length), task.name)
        collate = task.collator(processor, model=model)
        size = wanted.batch_size or source.batch_size
        return cls(rows, collate, task.task_kind, size, wanted.labelled, wanted.aligned, source)

    def at(self, step: int, partners: Sequence[int] = ()) -> Batch:
        """The batch of a step, from 0, on the device; of aligned rows, the partners of these of the train split."""
        places = list(partners) if self.aligned else self._places(step)
        batch = self.collate([self.rows[i] for i in places])
        if not self.labelled:
            batch, _ = self.kind.parted(batch)
        return {name: carried(value, self.source.device) for name, value in batch.items()}

    def _places(self, step: int) -> list[int]:
        epoch, place = divmod(step, -(-len(self.rows) // self.size))
        return ShuffledBatches(len(self.rows), self.size, self.source.seed, epoch).chunks[place]


def _check_aligned(rows: Encoded, own: Encoded, name: str) -> None:
    """Raises TrainError unless every row that is trained on has a partner."""
    if len(rows) != len(own) or rows.dropped or own.dropped:
        gone = rows.dropped + own.dropped
        cut = f" ({gone} left out, as max_length leaves nothing of them to learn)" if gone else ""
        raise TrainError(
            f"{name} has {len(rows)} rows beside {len(own)} that are trained on{cut}; it takes a pair for each"
        )
