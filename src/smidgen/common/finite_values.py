"""Values that are not finite are refused by name: a delta that holds one gives nan for every input."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor with values that are NaN or infinite, and how many: `x holds 3 values of 16 that are not
    finite`; None if there is none."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not (finite := torch.isfinite(tensor)).all():
            return f"{name} holds {int((~finite).sum())} values of {tensor.numel()} that are not finite (nan or inf)"
    return None
