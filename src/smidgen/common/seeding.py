"""Random numbers as a function of a seed and a name; torch's global generator is left alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(*name: object) -> Iterator[None]:
    """torch's global generator, inside, is a function of the name; afterwards it is as it was."""
    digest = hashlib.sha256("/".join(map(str, name)).encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield
