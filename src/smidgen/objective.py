"""Objectives: the loss of (outputs, batch, reference outputs), where the reference is the model with its edits off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from smidgen.errors import SmidgenError


class Objective:
    """Base of all objectives; calling one gives a scalar loss."""

    needs_reference: ClassVar[bool] = False

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

        loss = task + weight * KL(p_base || p_tuned), mean over positions that carry a label

    For causal LMs that should keep what they know while they learn something new.

    Raises:
        SmidgenError: weight is not positive.
    """

    weight: float = 0.1
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise SmidgenError(f"StayClose: weight={self.weight!r} must be above 0")

    def __call__(self, outputs: Any, batch: dict[str, Tensor], reference: Any | None = None) -> Tensor:
        if reference is None:
            raise SmidgenError("StayClose needs the base's outputs")
        tuned = F.log_softmax(outputs.logits.float(), dim=-1)  # (B, ..., V)
        base = F.log_softmax(reference.logits.float(), dim=-1)
        divergence = F.kl_div(tuned, base, log_target=True, reduction="none").sum(-1)  # (B, ...)
        if divergence.ndim == 2 and batch["labels"].shape == divergence.shape:
            kept = (batch["labels"][:, 1:] != -100).float()  # position t predicts label t + 1
            mean = (divergence[:, :-1] * kept).sum() / kept.sum().clamp(min=1)
        else:
            mean = divergence.mean()
        return outputs.loss + self.weight * mean
