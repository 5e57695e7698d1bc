"""Objective: a loss, and what it needs: outputs to compare with, other batches, and how examples add up in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from smidgen.common.errors import SmidgenError, TrainError
from smidgen.data.kinds.base import TaskKind
from smidgen.data.labels import IGNORED, LabelPlace
from smidgen.steps.identity import identity_of
from smidgen.steps.penalties import penalty
from smidgen.steps.step import BASE, Batches, Reference, Step

MEAN, SUM, BATCH = "mean", "sum", "batch"
REDUCTIONS = (MEAN, SUM, BATCH)


@dataclass(frozen=True)
class Needs:
    """What an objective reads beside the tuned model's outputs for the batch.

    Attributes:
        references: name -> whose outputs `step.reference(name)` gives, without gradient and in eval mode: "base" (the
            model with its edits off), "start" (a frozen copy of the model as the run begins), a Delta of the same
            base, or a module of one's own.
        batches: name -> batches of other data, one beside each training batch, as `step.batches[name]`.
    """

    references: Mapping[str, Reference] = field(default_factory=dict)
    batches: Mapping[str, Batches] = field(default_factory=dict)


class Objective:
    """Base of all objectives: a frozen dataclass with `loss`.

    An objective is told apart by its class and its fields (numbers, strings, tuples, dicts, deltas, tasks), so that a
    run with one of one's own can be resumed in another process. A field that does not count is `field(repr=False)`.

    Attributes:
        reduction: how the examples of a batch add up in the loss. "mean": the mean over rows, or over labels where they
            stand at positions. "sum": their sum. "batch": the loss of an example depends on others of its batch, which
            is then never cut into parts (`max_memory`) or shared by processes.
    """

    reduction: ClassVar[str] = MEAN

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        old = sorted({"__call__", "needs_reference", "on"} & set(vars(cls)))
        if old:
            raise TypeError(
                f"{cls.__name__} defines {', '.join(old)}; an objective defines loss(self, step), and needs(self, "
                "kind) for other outputs or batches"
            )

    def needs(self, kind: TaskKind) -> Needs:
        """What it reads for tasks of a kind. Raises SmidgenError if it has no meaning for them."""
        return Needs()

    def loss(self, step: Step) -> Tensor:
        """The loss, a scalar, as `reduction` says; penalties apart."""
        raise TypeError(f"{type(self).__name__} does not say how to compute its loss: define loss(self, step)")

    def penalty(self, step: Step) -> Tensor | None:
        """What is added once for each optimiser step, a scalar: by default what the recipe's methods ask for."""
        return penalty(step.model)

    @property
    def identity(self) -> str:
        """What tells it apart in a run's record, the same in every process.

        Raises:
            TrainError: a field holds what cannot be told apart so, such as a function; or there are attributes beside
                the fields.
        """
        return identity_of(self)


def reduction_of(objective: Objective, kind: TaskKind) -> str:
    """How the examples of a batch add up, the kind's own coupling counted. Raises TrainError if it is unknown."""
    if objective.reduction not in REDUCTIONS:
        raise TrainError(
            f"{type(objective).__name__}.reduction={objective.reduction!r} is not one of {', '.join(REDUCTIONS)}"
        )
    return BATCH if kind.couples_batch else objective.reduction


@dataclass(frozen=True)
class TaskLoss(Objective):
    """The loss that the model class itself computes from its labels."""

    def loss(self, step: Step) -> Tensor:
        return task_loss(step)


@dataclass(frozen=True)
class StayClose(Objective):
    """The task's loss, plus `weight` times the divergence of the base's predictions from the tuned ones.

        loss = task + weight * KL(p_base || p_tuned), mean over what carries a label

    A label is that of its example ("classification") or of its position ("tokens"); in "causal-lm", where position t
    predicts label t + 1, it belongs to the position before. For models that should keep what they know while they learn
    something new.

    Fields:
        weight: of the divergence, in nats.

    Raises:
        SmidgenError: weight is not positive; predictions of the task's kind are no distributions over its labels.
    """

    weight: float = 0.1

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise SmidgenError(f"StayClose: weight={self.weight!r} must be above 0")

    def needs(self, kind: TaskKind) -> Needs:
        if kind.normal:
            raise SmidgenError("StayClose compares distributions over labels; a regression has none: use TaskLoss()")
        return Needs(references={"base": BASE})

    def loss(self, step: Step) -> Tensor:
        tuned = F.log_softmax(step.outputs().logits.float(), dim=-1)  # (B, ..., V)
        base = F.log_softmax(step.reference("base").logits.float(), dim=-1)
        divergence = F.kl_div(tuned, base, log_target=True, reduction="none").sum(-1)  # (B, ...)
        return task_loss(step) + self.weight * _mean(divergence, step)


def task_loss(step: Step, batch: str = "train") -> Tensor:
    """The loss that the model class computes from a batch's labels. Raises TrainError if it gives none."""
    loss = getattr(step.outputs(batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise TrainError(f"{type(step.model).__name__} gives no loss for the {batch} batch: it has no labels")
    return loss


def _mean(values: Tensor, step: Step) -> Tensor:
    """Mean of (B,), or of (B, T) over the positions that predict a label."""
    if values.ndim == 1:
        return values.mean()
    labels = step.batch["labels"]  # (B, T)
    if step.kind.labels_at is LabelPlace.EXAMPLE or labels.shape != values.shape:
        raise SmidgenError(
            f"StayClose: labels {tuple(labels.shape)} beside predictions at {tuple(values.shape)} do not fit a task of "
            f"kind {step.kind.name!r}"
        )
    values, labels = step.kind.aligned(values, labels)
    kept = (labels != IGNORED).float()
    return (values * kept).sum() / kept.sum().clamp(min=1)
