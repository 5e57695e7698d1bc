"""Feed: the batches of training, epoch by epoch, and the kept prefix of their rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.attachment import attachment
from smidgen.batches import PackedBatches, ShuffledBatches
from smidgen.encode import Encoded
from smidgen.errors import TrainError
from smidgen.settings import PACK, Settings
from smidgen.speed.apart import packer_for
from smidgen.speed.cache import PrefixCache
from smidgen.speed.carry import carried
from smidgen.speed.cut import why_not
from smidgen.speed.kept import Kept
from smidgen.speed.pack import Packer

Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]
ON = "on"


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

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Row numbers and batch, in the order of the epoch, without the first `skip`."""
        order = self._order(epoch, skip)
        for places, batch in self._packed(order) if isinstance(order, PackedBatches) else self._padded(order):
            yield places, {k: carried(v, self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _padded(self, order: ShuffledBatches) -> Iterator[tuple[list[int], dict[str, Any]]]:
        for places in order:
            yield places, self.collate([self.rows[i] for i in places])

    def _packed(self, order: PackedBatches) -> Iterator[tuple[list[int], dict[str, Any]]]:
        for rows in order:
            yield [i for row in rows for i in row], self.packer([[self.rows[i] for i in row] for row in rows])

    def _order(self, epoch: int, skip: int = 0) -> ShuffledBatches | PackedBatches:
        s, lengths = self.settings, self.rows.lengths
        share: Any = {"skip": skip, "rank": self.rank, "world": self.world}
        if s.batching == PACK:
            return PackedBatches(lengths, self.rows.max_length, s.batch_size, s.seed, epoch, **share)
        if s.batching == "length" or s.batch_tokens is not None:
            share |= {"lengths": lengths, "tokens": s.batch_tokens}
        return ShuffledBatches(len(self.rows), s.batch_size, s.seed, epoch, **share)


def kept_prefix(
    model: nn.Module,
    splits: Sequence[Sequence[dict[str, Any]]],
    collate: Collate,
    settings: Settings,
    before: str | None,
    folder: str | os.PathLike[str] | None,
    shared: Kept | None = None,
) -> tuple[list[PrefixCache | None], str]:
    """A cache for each split, and "on"; or no cache, and why.

    Args:
        before: what came of it at the first start of a run that is resumed: it is done, or not done, again.
        folder: for what is too large for memory, if a cache is insisted on.
        shared: caches that earlier runs filled, and the epochs of all runs.

    Raises:
        TrainError: a cache is insisted on and cannot be had; says why.
    """
    none: list[PrefixCache | None] = [None] * len(splits)
    insist = before == ON or bool(settings.cache)
    if before not in (None, ON):
        return none, before
    epochs, folder = (settings.epochs, folder) if shared is None else (shared.epochs, shared.folder)
    if settings.cache is False or (epochs < 2 and not insist):
        return none, "off" if settings.cache is False else "one epoch has nothing to gain"
    packed = "packed rows hold several examples, and states are kept of each example alone"
    reason = packed if settings.batching == PACK else why_not(model, attachment(model).plan)
    if reason is None:
        try:
            fill = partial(_filled, model, collate, settings, folder if insist else None)
            return list(map(fill, splits) if shared is None else shared.caches(model, splits, fill)), ON
        except TrainError as error:
            reason = str(error)
    if insist:
        raise TrainError(f"cache=True, but {reason}; leave it out")
    return none, reason


def _filled(
    model: nn.Module,
    collate: Collate,
    settings: Settings,
    folder: str | os.PathLike[str] | None,
    rows: Sequence[dict[str, Any]],
) -> PrefixCache:
    cache = PrefixCache(model, attachment(model).plan)
    cache.fill(rows, collate, batch_size=2 * settings.batch_size, limit_bytes=settings.cache_bytes, folder=folder)
    return cache
