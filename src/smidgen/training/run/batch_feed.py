"""Feed: the batches of training, epoch by epoch, and the kept prefix of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from smidgen.common.devices import carried
from smidgen.data.batching import PackedBatches, ShuffledBatches
from smidgen.data.encoded import Encoded
from smidgen.data.kinds.base import Batch, Collate
from smidgen.efficiency.packing.isolation_check import packer_for
from smidgen.efficiency.packing.packer import Packer
from smidgen.training.run.settings import PACK, Settings


@dataclass(frozen=True)
class Feed:
    """Encoded rows as batches on a device, for one process of several.

    Attributes:
        packer: makes batches of packed rows; `ready` finds one that the model understands.
    """

    rows: Encoded
    collate: Collate
    settings: Settings
    rank: int
    world: int
    device: torch.device
    packer: Packer = field(default_factory=Packer)

    def ready(self, model: nn.Module) -> Feed:
        """The feed for a model: with `batching="pack"`, packed rows as it keeps their examples apart.

        Raises:
            TrainError: it does not.
        """
        if self.settings.batching != PACK:
            return self
        rows = self.rows
        assert rows.max_length is not None  # what can be packed has tokens
        return replace(self, packer=packer_for(model, rows, rows.lengths, self.collate, rows.max_length))

    @property
    def steps(self) -> int:
        """Steps in all epochs. Raises TrainError if a row is longer than `batch_tokens`."""
        return self.before(self.settings.epochs)

    def before(self, epoch: int) -> int:
        """Steps in all epochs before this one; epochs may have different numbers of batches."""
        return sum(self._counts[:epoch])

    @cached_property
    def _counts(self) -> list[int]:
        return [len(self._order(epoch)) for epoch in range(self.settings.epochs)]

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[list[int], Batch]]:
        """Row numbers and batch, in the order of the epoch, without the first `skip`.

        A process whose share of a batch is empty gets no number and the first row of the split, to count for nothing.
        """
        order = self._order(epoch, skip)
        for places, batch in self._packed(order) if isinstance(order, PackedBatches) else self._padded(order):
            yield places, {k: carried(v, self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _padded(self, order: ShuffledBatches) -> Iterator[tuple[list[int], Batch]]:
        for places in order:
            yield places, self.collate([self.rows[i] for i in places or (0,)])

    def _packed(self, order: PackedBatches) -> Iterator[tuple[list[int], Batch]]:
        for rows in order:
            batch = self.packer([[self.rows[i] for i in row] for row in rows or [[0]]])
            yield (
                [i for row in rows for i in row],
                cast(Batch, batch),
            )  # its one setting is handed on as well

    def _order(self, epoch: int, skip: int = 0) -> ShuffledBatches | PackedBatches:
        """The epoch's batches for this process, packed or shuffled, without the first `skip`."""
        s, lengths, most = self.settings, self.rows.lengths, self.rows.max_length
        if s.batching == PACK and most is not None:
            return PackedBatches(
                lengths, most, s.batch_size, s.seed, epoch, skip=skip, rank=self.rank, world=self.world
            )
        return ShuffledBatches(
            len(self.rows),
            s.batch_size,
            s.seed,
            epoch,
            skip=skip,
            rank=self.rank,
            world=self.world,
            lengths=lengths if s.batching == "length" or s.batch_tokens is not None else None,
            tokens=s.batch_tokens,
        )
