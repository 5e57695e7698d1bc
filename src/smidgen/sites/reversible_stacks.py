"""Modules that compute their blocks in one autograd function and again, by a function of their own, on the way back."""

from __future__ import annotations

from torch import nn

CLASSES = ("ReformerEncoder",)


def reversible(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> each module of this kind."""
    return {path: m for path, m in model.named_modules() if any(c.__name__ in CLASSES for c in type(m).__mro__)}
