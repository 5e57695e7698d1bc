"""A short course of training before scoring, and what it tells: how far each value moved, and which way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn

from smidgen.common.errors import TrainError
from smidgen.common.module_modes import modes_kept
from smidgen.data.batching import ShuffledBatches
from smidgen.data.processor import Processor
from smidgen.data.task import Task
from smidgen.planning.frozen_modules import frozen_prefix
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.steps.divergence import remedy
from smidgen.steps.loss_computation import At, Beside, loss_of
from smidgen.steps.objectives import Objective, TaskLoss
from smidgen.steps.optimizer_groups import optimizer
from smidgen.steps.other_batches import Source


@dataclass(frozen=True)
class Course:
    """How to train for a few steps: AdamW, constant rate after a linear warm-up of a tenth, clipping at 1.

    Attributes:
        steps: optimiser steps; 0 for none.
        lr, head_lr: None for the methods' own.
    """

    steps: int
    seed: int = 0
    batch_size: int = 32
    max_length: int | None = None
    lr: float | None = None
    head_lr: float | None = None
    objective: Objective | None = None


def take(
    model: nn.Module, task: Task, course: Course, processor: Processor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train what is attached in place; the mode is left as it came.

    Returns:
        |theta_w - theta_0| (change) and sum over steps of -theta * d loss / d theta (movement), by saved name, in the
        shape of the tensors.

    Raises:
        TrainError: a loss that is not finite.
    """
    trained = trained_parameters(model)
    start = {name: p.detach().clone() for name, p in trained.items()}
    moved = {name: torch.zeros_like(p) for name, p in start.items()}
    with modes_kept(model), torch.random.fork_rng():
        torch.manual_seed(course.seed)
        model.train()
        for module in frozen_prefix(model, attachment(model).plan):
            module.eval()
        _steps(model, task, course, processor, moved)
    return {name: (p.detach() - start[name]).abs() for name, p in trained.items()}, moved


def _steps(
    model: nn.Module,
    task: Task,
    course: Course,
    processor: Processor,
    moved: dict[str, Tensor],
) -> None:
    """Trains what is attached for the warm-up's steps and adds -gradient * value, before each step, to `moved`."""
    trained, adam = trained_parameters(model), optimizer(model, course.lr, course.head_lr)
    rates = [group["lr"] for group in adam.param_groups]
    batches, objective = _batches(model, task, course, processor), course.objective or TaskLoss()
    source = Source(course.seed, course.batch_size, course.max_length, next(model.parameters()).device)
    beside = Beside.of(objective, model, task, processor, source)
    for step in range(course.steps):
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / max(1, course.steps // 10))
        places, found = next(batches)
        batch = {k: v.to(source.device) for k, v in found.items()}
        loss = loss_of(model, batch, objective, beside, At(step, course.steps, places=places))
        if not torch.isfinite(loss):
            raise TrainError(
                f"the loss is {float(loss.detach())} at step {step} of the warm-up for Select; {remedy(model)}"
            )
        loss.backward()
        for name, p in trained.items():
            if p.grad is not None:
                moved[name] -= p.detach() * p.grad
        nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)


def _batches(
    model: nn.Module, task: Task, course: Course, processor: Processor
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Row numbers and tensors, epoch after epoch."""
    rows = task.encode(processor, "train", max_length=course.max_length)
    collate = task.collator(processor, model=model)
    for epoch in count():
        for places in ShuffledBatches(len(rows), course.batch_size, course.seed, epoch):
            yield places, collate([rows[i] for i in places])
