"""Objectives: the loss of (outputs, batch, reference outputs), where the reference is the model with its edits off."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from smidgen.common.errors import SmidgenError
from smidgen.data.kinds.base import kind_named
from smidgen.data.labels import LabelPlace


class Objective:
    """Base of all objectives; calling one gives a scalar loss."""

    needs_reference: ClassVar[bool] = False

    def on(self, kind: str) -> Objective:
        """The objective for tasks of a kind, by its name: "classification", "regression", "tokens", "causal-lm", ...

        Training asks for it, since shapes do not tell whether position t predicts label t or label t + 1.
        """
        return self

    def __call__(self, outputs: Any, batch: dict[str, Tensor], reference: Any | None = None) -> Tensor:
        """The loss. `reference` holds the base's outputs if `needs_reference`, else None."""
        raise TypeError(f"{type(self).__name__} does not say how to compute its loss")


@dataclass(frozen=True)
class TaskLoss(Objective):
    """The loss that the model class itself computes from its labels."""

    def __call__(self, outputs: Any, batch: dict[str, Tensor], reference: Any | None = None) -> Tensor:
        return outputs.loss


@dataclass(frozen=True)
class StayClose(Objective):
    """The task's loss, plus `weight` times the divergence of the base's predictions from the tuned ones.

        loss = task + weight * KL(p_base || p_tuned), mean over what carries a label

    A label is that of its example ("classification") or of its position ("tokens"); in "causal-lm", where position t
    predicts label t + 1, it belongs to the position before. For models that should keep what they know while they learn
    something new.

    Fields:
        weight: of the divergence.
        kind: of the task; `fit` fills it in.

    Raises:
        SmidgenError: weight is not positive; the kind is not known where labels stand at positions, or its predictions
            are no distributions (regression).
    """

    weight: float = 0.1
    kind: str | None = field(default=None, repr=False)
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise SmidgenError(f"StayClose: weight={self.weight!r} must be above 0")
        if self.kind is not None and kind_named(self.kind).normal:
            raise SmidgenError("StayClose compares distributions over labels; a regression has none: use TaskLoss()")

    def on(self, kind: str) -> StayClose:
        return replace(self, kind=kind)

    def __call__(self, outputs: Any, batch: dict[str, Tensor], reference: Any | None = None) -> Tensor:
        if reference is None:
            raise SmidgenError("StayClose needs the base's outputs")
        tuned = F.log_softmax(outputs.logits.float(), dim=-1)  # (B, ..., V)
        base = F.log_softmax(reference.logits.float(), dim=-1)
        divergence = F.kl_div(tuned, base, log_target=True, reduction="none").sum(-1)  # (B, ...)
        return outputs.loss + self.weight * self._mean(divergence, batch)

    def _mean(self, divergence: Tensor, batch: dict[str, Tensor]) -> Tensor:
        if divergence.ndim == 1:
            return divergence.mean()
        labels = batch["labels"]  # (B, T)
        about = None if self.kind is None else kind_named(self.kind)
        if about is None or about.labels_at is LabelPlace.EXAMPLE or labels.shape != divergence.shape:
            raise SmidgenError(
                f"StayClose: labels {tuple(labels.shape)} beside predictions at {tuple(divergence.shape)} do not fit "
                f"kind={self.kind!r}; StayClose(kind='tokens') or (kind='causal-lm') says what a label belongs to"
            )
        divergence, labels = about.aligned(divergence, labels)
        kept = (labels != -100).float()
        return (divergence * kept).sum() / kept.sum().clamp(min=1)
