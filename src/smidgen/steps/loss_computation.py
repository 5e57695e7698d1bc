"""loss_of: the one place where an objective meets a model and a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from smidgen.common.errors import TrainError
from smidgen.common.wrappers import bare
from smidgen.data.kinds.base import Outputs, TaskKind
from smidgen.data.processor import Processor
from smidgen.data.task import Task
from smidgen.steps.objectives import Objective
from smidgen.steps.other_batches import OtherBatches, Source
from smidgen.steps.references import Models, base_running, reference_models
from smidgen.steps.step import TRAIN, Batch, Step


@dataclass(frozen=True, eq=False)
class Beside:
    """What an objective reads beside the tuned model and its batch, made ready for a run."""

    kind: TaskKind
    references: Models = field(default_factory=dict)
    batches: Mapping[str, OtherBatches] = field(default_factory=dict)

    @classmethod
    def of(cls, objective: Objective, model: nn.Module, task: Task, processor: Processor, source: Source) -> Beside:
        """For a model with a recipe attached, where the run begins.

        Raises:
            SmidgenError: the objective has no meaning for the task's kind.
            TrainError, DataError, DeltaError: a reference or a split that cannot be had.
        """
        needs = objective.needs(task.task_kind)
        feeds = {name: OtherBatches.of(each, task, processor, model, source) for name, each in needs.batches.items()}
        return cls(task.task_kind, reference_models(model, needs.references), feeds)


@dataclass(frozen=True)
class At:
    """Where in a run a loss is computed.

    Attributes:
        number: of the optimiser step, from 0.
        total: steps in all; 0 if that is not known.
        weight: of a part of a batch in the batch's loss.
        share: of a part of a batch in what is added once for a batch.
        places: numbers of the batch's rows in the train split, for batches that are aligned with them.
    """

    number: int = 0
    total: int = 0
    weight: float = 1.0
    share: float = 1.0
    places: Sequence[int] = ()


def loss_of(model: nn.Module, batch: Batch, objective: Objective, beside: Beside, at: At | None = None) -> Tensor:
    """The loss of a batch with its penalties, a scalar with gradient.

    Args:
        model: with a recipe attached; a wrapper that training calls (DDP) is called for what is tuned.
        batch: tensors (B, ...) on the model's device.

    Raises:
        TrainError: the objective gives no scalar, or reads what it does not say that it needs.
    """
    at = at or At()
    batches = {TRAIN: batch, **{name: feed.at(at.number, at.places) for name, feed in beside.batches.items()}}

    def run(reference: str | None, name: str) -> Outputs:
        """One forward pass."""
        if reference is None:
            return beside.kind.forward(model, batches[name])
        if reference not in beside.references:
            known = ", ".join(beside.references) or "none"
            raise TrainError(f"the objective reads a reference {reference!r}, but needs() names {known}")
        other = beside.references[reference]
        if other is None:
            with base_running(model):
                return beside.kind.forward(bare(model), batches[name])
        with torch.no_grad():
            return beside.kind.forward(other, batches[name])

    step = Step(bare(model), beside.kind, batches, run, at.number, at.total)
    loss = objective.loss(step)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise TrainError(f"{type(objective).__name__} gives {found}, where a loss is one number")
    loss, more = loss * at.weight if at.weight != 1 else loss, objective.penalty(step)
    return loss if more is None else loss + more * at.share
