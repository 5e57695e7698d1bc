"""What an added tensor starts at: a function of (seed, name), so that it does not depend on what else is there."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from smidgen.rows import Row


def initial(row: Row, seed: int) -> dict[str, Tensor]:
    """Fresh tensors of an added row, symbol -> tensor; torch's global generator is left alone."""
    name = f"{seed}/{row.site.path}/{row.key}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1)
        return row.method.init(row.site)
