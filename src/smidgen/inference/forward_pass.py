"""A split through a model: outputs and references per example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from smidgen.data.task import Task
from smidgen.data.text.encoding import Encoded

Around = Callable[[Sequence[int], Mapping[str, Tensor]], AbstractContextManager[None]]


def run_examples(
    model: nn.Module,
    encoded: Encoded | Sequence[dict[str, Any]],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 64,
    around: Around | None = None,
) -> list[tuple[Any, Any]]:
    """(prediction, reference) of each example; in eval mode, mode restored. Batches go by length, order does not.

    `around` gives what a forward pass on some rows stands in, such as a cache of what lies below the lowest edit.
    """
    results: list[Any] = [None] * len(encoded)

    def take(rows: Sequence[int], logits: Tensor, labels: Tensor | None) -> None:
        for row, pair in zip(rows, _pairs(task, logits, labels), strict=True):
            results[row] = pair

    forwards(model, encoded, task.collator(tokenizer, model=model), batch_size, take, around)
    return results


def forwards(
    model: nn.Module,
    encoded: Encoded | Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    batch_size: int,
    take: Callable[[Sequence[int], Tensor, Tensor | None], None],
    around: Around | None = None,
) -> None:
    """Run a model over encoded texts, by length, in eval mode without gradients; modes are restored, after errors too.

    Args:
        take: is given the numbers of each batch's rows, its logits in float32, and its labels.
    """
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = {k: v.to(device) for k, v in collate([encoded[i] for i in rows]).items()}
                labels = batch.pop("labels", None)
                with around(rows, batch) if around else nullcontext():
                    logits = model(**batch).logits.float()
                take(rows, logits, labels)
    finally:
        for module, mode in training.items():
            module.training = mode


def _pairs(task: Task, logits: Tensor, labels: Tensor | None) -> list[tuple[Any, Any]]:
    if labels is None:
        return [(p, None) for p in _predictions(task, logits)]
    if task.kind == "causal-lm":
        return _language(logits, labels)
    if task.kind == "tokens":
        return [_tokens(task, row, label) for row, label in zip(logits.argmax(-1), labels, strict=True)]
    return list(zip(_predictions(task, logits), labels.tolist(), strict=True))


def _predictions(task: Task, logits: Tensor) -> list[Any]:
    return (logits.squeeze(-1) if task.kind == "regression" else logits.argmax(-1)).tolist()


def _tokens(task: Task, predicted: Tensor, labels: Tensor) -> tuple[list[str], list[str]]:
    kept = labels != -100
    names = task.labels
    return [names[i] for i in predicted[kept].tolist()], [names[i] for i in labels[kept].tolist()]


def _language(logits: Tensor, labels: Tensor) -> list[tuple[Any, Any]]:
    """Per example: summed negative log-likelihood and number of predicted tokens. logits: (B, T, V)."""
    shifted, targets = logits[:, :-1], labels[:, 1:]
    nll = F.cross_entropy(shifted.transpose(1, 2), targets, ignore_index=-100, reduction="none").sum(1)
    return list(zip(nll.tolist(), (targets != -100).sum(1).tolist(), strict=True))
