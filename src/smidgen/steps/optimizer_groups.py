"""Optimiser groups of an attached model: one learning rate per method, one for the head, no decay on edits."""

from __future__ import annotations

import torch
from torch import nn

from smidgen.methods.base import Method
from smidgen.planning.plans import Plan
from smidgen.ports.attachment_record import attachment, trained_parameters

HEAD_LR = 5e-3
FUSED = ("cpu", "cuda")  # where torch has AdamW as one kernel


def parameter_groups(
    model: nn.Module, lr: float | None = None, head_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, object]]:
    """Groups for any torch optimiser, in the plan's order; one for each learning rate of a method.

    Args:
        lr: for all methods; by default each method's own (LN 3e-3, LoRA 3e-3, Full 5e-5).
        head_lr: for the head; 5e-3 by default.
        weight_decay: of the trained values; 0 by default, because decay pulls a gain to 0, not to where it began.

    Raises:
        AttachError: nothing is attached.
    """
    record = attachment(model)
    masters = dict(record.trained())
    groups = []
    for index, method in enumerate(record.plan.recipe):
        if isinstance(method, Method):
            for rate, names in _by_rate(record.plan, index).items():
                label = str(method) if rate == 1 else f"{method} x {rate:g}"
                groups.append(_group(label, masters, names, rate * (lr or method.lr), weight_decay))
    if record.plan.head:
        names = [name for name, _ in record.plan.head]
        groups.append(_group("head", masters, names, head_lr or HEAD_LR, weight_decay))
    return groups


def _by_rate(plan: Plan, index: int) -> dict[float, list[str]]:
    """Rate over the method's own -> saved names, for one method of a recipe."""
    found: dict[float, list[str]] = {}
    for entry in plan.entries:
        for term, name, _ in entry.trained() if entry.index == index else ():
            found.setdefault(entry.method.rate(term), []).append(name)
    return found


def _group(
    label: str, masters: dict[str, nn.Parameter], names: list[str], lr: float, weight_decay: float
) -> dict[str, object]:
    parameters = [masters[name] for name in names]
    return {"params": parameters, "lr": lr, "weight_decay": weight_decay, "name": label, "names": names}


def optimizer(
    model: nn.Module, lr: float | None = None, head_lr: float | None = None, weight_decay: float = 0.0
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; hand it to Trainer as `optimizers=(sm.optimizer(model), None)`.

    Args and errors: as in `parameter_groups`.
    """
    groups = parameter_groups(model, lr, head_lr, weight_decay)
    fused = all(p.device.type in FUSED for p in trained_parameters(model).values())  # one call for many small tensors
    return torch.optim.AdamW(groups, fused=fused or None)
