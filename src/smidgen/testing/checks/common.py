"""What several checks need."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smidgen.steps import gradient_checks
from smidgen.testing.cases import Case


def equal(a: Tensor, b: Tensor, what: str) -> None:
    """Bit for bit."""
    assert torch.equal(a, b), f"{what}: differs by up to {(a.double() - b.double()).abs().max().item():.3g}"


def hooks(model: nn.Module) -> int:
    """Number of forward hooks on all modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def untrained(case: Case) -> set[str]:
    """Names of trained tensors that may stand still."""
    return set(gradient_checks.may_stand_still(case.model))
