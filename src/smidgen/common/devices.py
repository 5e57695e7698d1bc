"""Tensors on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def carried(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; to a GPU through pinned memory, so that the copy runs beside the work that is queued there."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
