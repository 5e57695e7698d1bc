"""Feed: the batches of training, epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smidgen.batches import ShuffledBatches
from smidgen.encode import Encoded
from smidgen.settings import Settings


@dataclass(frozen=True)
class Feed:
    """Encoded rows as batches on a device, for one process of several."""

    rows: Encoded
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    settings: Settings
    rank: int
    world: int
    device: torch.device

    @property
    def batches(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.rows) // self.settings.batch_size)

    @property
    def steps(self) -> int:
        """Steps in all epochs."""
        return self.batches * self.settings.epochs

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[dict[str, Tensor]]:
        """The batches of an epoch in its order, without the first `skip`."""
        s = self.settings
        lengths = self.rows.lengths if s.batching == "length" else None
        share = {"rank": self.rank, "world": self.world}
        for places in ShuffledBatches(len(self.rows), s.batch_size, s.seed, epoch, skip=skip, lengths=lengths, **share):
            batch = self.collate([self.rows[i] for i in places])
            yield {k: v.to(self.device) for k, v in batch.items()}
