"""Feed: the batches of training, epoch by epoch, and where a forward pass on them starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.attachment import attachment
from smidgen.batches import ShuffledBatches
from smidgen.encode import Encoded
from smidgen.errors import TrainError
from smidgen.settings import Settings
from smidgen.speed.cache import PrefixCache
from smidgen.speed.cut import why_not
from smidgen.speed.kept import Kept

Around = Callable[[Sequence[int], Mapping[str, Tensor]], AbstractContextManager[None]]
Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]
ON = "on"


@dataclass(frozen=True)
class Feed:
    """Encoded rows as batches on a device, for one process of several."""

    rows: Encoded
    collate: Collate
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

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Row numbers and batch, in the order of the epoch, without the first `skip`."""
        s = self.settings
        lengths = self.rows.lengths if s.batching == "length" else None
        share = {"rank": self.rank, "world": self.world}
        for places in ShuffledBatches(len(self.rows), s.batch_size, s.seed, epoch, skip=skip, lengths=lengths, **share):
            batch = self.collate([self.rows[i] for i in places])
            yield places, {k: v.to(self.device) for k, v in batch.items()}


def around(cache: PrefixCache | None) -> Around:
    """What a forward pass on some rows stands in: the states of a cache enter at the first edited block."""
    if cache is None:
        return lambda places, batch: nullcontext()
    return lambda places, batch: cache.feeding(cache.batch(places, batch["input_ids"].shape[1]))


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
    reason = why_not(model, attachment(model).plan)
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
