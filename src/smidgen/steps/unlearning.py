"""Unlearning: forget some rows and keep others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from smidgen.common.errors import SmidgenError
from smidgen.data.kinds.base import TaskKind
from smidgen.data.task import Task
from smidgen.steps.objectives import Needs, Objective, task_loss
from smidgen.steps.step import Batches, Step


@dataclass(frozen=True)
class GradientDifference(Objective):
    """Gradient difference (Maini et al. 2024, TOFU, arXiv 2401.06121, section 4): ascent on what is to be forgotten,
    descent on what is to be kept.

        loss = -task(forget) + weight * task(retain)

    `fit` trains on the rows to forget. Give a task without a validation split (`validation=0`), or one of rows to keep:
    the best epoch on rows to forget would be the one that forgot least.

    Fields:
        retain: a task of the same kind, whose train split is to be kept.
        weight: of what is to be kept.

    Raises:
        SmidgenError: weight is negative.
    """

    retain: Task
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise SmidgenError(f"GradientDifference: weight={self.weight!r} must not be negative")

    def needs(self, kind: TaskKind) -> Needs:
        """A batch to keep beside each one to forget."""
        return Needs(batches={"retain": Batches(self.retain)})

    def loss(self, step: Step) -> Tensor:
        """The difference."""
        return self.weight * task_loss(step, "retain") - task_loss(step)
