"""Floating-point types: the base's, and that of the trained master values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LOW = (torch.bfloat16, torch.float16)


def master_dtype(base: torch.dtype) -> torch.dtype:
    """dtype in which values are trained: float32, or float64 on a float64 base."""
    return torch.float64 if base == torch.float64 else torch.float32


def base_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that most of a model's real numbers have; codes of quantised weights are whole numbers."""
    counts: dict[torch.dtype, int] = {}
    for tensor in (t for t in tensors.values() if t.is_floating_point()):
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda d: counts[d], default=torch.float32)
