"""Random numbers that are a function of a name, so that they do not depend on what else is drawn."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def uniform(name: str, *shape: int) -> Tensor:
    """Uniform in [0, 1), float64."""
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(shape, dtype=torch.float64, generator=generator)
