"""A split through a model: outputs and references per example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from smidgen.common.module_modes import evaluating
from smidgen.data.encoded import Example
from smidgen.data.kinds.base import Collate, Outputs, Pair, TaskKind
from smidgen.data.processor import Processor
from smidgen.data.task import Task

Around = Callable[[Sequence[int], Mapping[str, Tensor]], AbstractContextManager[None]]
Take = Callable[[Sequence[int], Outputs, Tensor | None], None]


def run_examples(
    model: nn.Module,
    encoded: Sequence[Example],
    task: Task,
    processor: Processor,
    batch_size: int = 64,
    around: Around | None = None,
) -> list[Pair]:
    """(prediction, reference) of each example; in eval mode, mode restored. Batches go by length, order does not.

    `around` gives what a forward pass on some rows stands in, such as a cache of what lies below the lowest edit.
    """
    results: dict[int, Pair] = {}

    def take(rows: Sequence[int], outputs: Outputs, labels: Tensor | None) -> None:
        for row, pair in zip(rows, task.task_kind.pairs(outputs, labels, task.labels), strict=True):
            results[row] = task.task_kind.told(pair, encoded[row])

    forwards(model, encoded, task.task_kind, task.collator(processor, model=model), batch_size, take, around)
    return [results[row] for row in range(len(encoded))]


def forwards(
    model: nn.Module,
    encoded: Sequence[Example],
    kind: TaskKind,
    collate: Collate,
    batch_size: int,
    take: Take,
    around: Around | None = None,
) -> None:
    """Run a model over examples, by length, in eval mode without gradients; modes are restored, after errors too.

    Args:
        take: is given the numbers of each batch's rows, its outputs with `logits` in float32, and its labels.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(encoded)), key=lambda i: kind.length(encoded[i]))
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = {k: v.to(device) for k, v in collate([encoded[i] for i in rows]).items()}
            inputs, labels = kind.parted(batch)
            with around(rows, inputs) if around else nullcontext():
                outputs = kind.forward(model, inputs)
            outputs.logits = outputs.logits.float()
            take(rows, outputs, labels)
