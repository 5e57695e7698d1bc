"""Models of one base in several classes: what they have in common is in memory once."""

from __future__ import annotations

import torch
from torch import nn


def share_parameters(first: nn.Module, other: nn.Module) -> int:
    """Let a model have another's Parameter objects wherever name, shape and values are the same; gives their number."""
    known, count = dict(first.named_parameters(remove_duplicate=False)), 0
    for path, module in list(other.named_modules()):
        for term, own in list(module._parameters.items()):
            given = known.get(f"{path}.{term}" if path else term)
            if own is None or given is None or own is given or own.shape != given.shape or own.dtype != given.dtype:
                continue
            if torch.equal(own.to(given.device), given):
                module._parameters[term] = given
                count += 1
    return count
