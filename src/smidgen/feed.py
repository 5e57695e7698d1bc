"""Feed: the batches of training, epoch by epoch, and where a forward pass on them starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
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
    def steps(self) -> int:
        """Steps in all epochs. Raises TrainError if a row is longer than `batch_tokens`."""
        return self.before(self.settings.epochs)

    def before(self, epoch: int) -> int:
        """Steps in all epochs before this one; epochs may have different numbers of batches."""
        return sum(self._counts[:epoch])

    @cached_property
    def _counts(self) -> list[int]:
        return [len(self._order(epoch)) for epoch in range(self.settings.epochs)]

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Row numbers and batch, in the order of the epoch, without the first `skip`."""
        for places in self._order(epoch, skip):
            batch = self.collate([self.rows[i] for i in places])
            yield places, {k: v.to(self.device) for k, v in batch.items()}

    def _order(self, epoch: int, skip: int = 0) -> ShuffledBatches:
        s = self.settings
        options: Any = {"skip": skip, "rank": self.rank, "world": self.world, "tokens": s.batch_tokens}
        if s.batching == "length" or s.batch_tokens is not None:
            options["lengths"] = self.rows.lengths
        return ShuffledBatches(len(self.rows), s.batch_size, s.seed, epoch, **options)


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
) -> tuple[list[PrefixCache | None], str]:
    """A cache for each split, and "on"; or no cache, and why.

    Args:
        before: what came of it at the first start of a run that is resumed: it is done, or not done, again.
        folder: for what is too large for memory, if a cache is insisted on.

    Raises:
        TrainError: a cache is insisted on and cannot be had; says why.
    """
    none: list[PrefixCache | None] = [None] * len(splits)
    insist = before == ON or bool(settings.cache)
    if before not in (None, ON):
        return none, before
    if settings.cache is False or (settings.epochs < 2 and not insist):
        return none, "off" if settings.cache is False else "one epoch has nothing to gain"
    reason = why_not(model, attachment(model).plan)
    if reason is None:
        try:
            return [_filled(model, rows, collate, settings, folder if insist else None) for rows in splits], ON
        except TrainError as error:
            reason = str(error)
    if insist:
        raise TrainError(f"cache=True, but {reason}; leave it out")
    return none, reason


def _filled(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    collate: Collate,
    settings: Settings,
    folder: str | os.PathLike[str] | None,
) -> PrefixCache:
    cache = PrefixCache(model, attachment(model).plan)
    cache.fill(rows, collate, batch_size=2 * settings.batch_size, limit_bytes=settings.cache_bytes, folder=folder)
    return cache
