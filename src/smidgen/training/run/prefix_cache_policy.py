"""When the states below the lowest edit are kept, and the filling of that cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from smidgen.common.errors import TrainError
from smidgen.efficiency.prefix_cache.cache import PrefixCache
from smidgen.efficiency.prefix_cache.cut_point import why_not
from smidgen.efficiency.prefix_cache.shared_caches import Kept
from smidgen.ports.attachment_record import attachment
from smidgen.training.run.batch_feed import Collate
from smidgen.training.run.settings import PACK, Settings

ON = "on"


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
