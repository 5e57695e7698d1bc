"""When the states below the lowest edit are kept, and the filling of that cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from smidgen.common.errors import TrainError
from smidgen.data.kinds.base import Collate
from smidgen.efficiency.prefix_cache.cache import PrefixCache
from smidgen.efficiency.prefix_cache.cut_point import why_not
from smidgen.efficiency.prefix_cache.shared_caches import Kept
from smidgen.efficiency.prefix_cache.token_layout import Rows
from smidgen.ports.attachment_record import attachment
from smidgen.training.run.settings import PACK, Settings

ON = "on"


@dataclass(frozen=True, eq=False)
class Conditions:
    """What shortcuts depend on beside a model and its examples.

    Attributes:
        folder: for hidden states that are too large for memory, if a cache is insisted on.
        shared: caches that earlier runs filled, and the epochs of all runs.
    """

    collate: Collate
    settings: Settings
    folder: str | os.PathLike[str] | None = None
    shared: Kept | None = None


def kept_prefix(
    model: nn.Module, splits: Sequence[Rows], given: Conditions, before: str | None
) -> tuple[list[PrefixCache | None], str]:
    """A cache for each split, and "on"; or no cache, and why.

    Args:
        before: what came of it at the first start of a run that is resumed: it is done, or not done, again.

    Raises:
        TrainError: a cache is insisted on and cannot be had; says why.
    """
    settings, shared = given.settings, given.shared
    none: list[PrefixCache | None] = [None] * len(splits)
    insist = before == ON or bool(settings.cache)
    if before not in (None, ON):
        return none, before
    epochs, folder = (settings.epochs, given.folder) if shared is None else (shared.epochs, shared.folder)
    if settings.cache is False or (epochs < 2 and not insist):
        return none, "off" if settings.cache is False else "one epoch has nothing to gain"
    packed = "packed rows hold several examples, and states are kept of each example alone"
    reason = packed if settings.batching == PACK else why_not(model, attachment(model).plan)
    if reason is None:
        try:
            fill = partial(_filled, model, given, folder if insist else None)
            return list(map(fill, splits) if shared is None else shared.caches(model, splits, fill)), ON
        except TrainError as error:
            reason = str(error)
    if insist:
        raise TrainError(f"cache=True, but {reason}; leave it out")
    return none, reason


def _filled(
    model: nn.Module,
    given: Conditions,
    folder: str | os.PathLike[str] | None,
    rows: Rows,
) -> PrefixCache:
    cache, settings = PrefixCache(model, attachment(model).plan), given.settings
    cache.fill(rows, given.collate, batch_size=2 * settings.batch_size, limit_bytes=settings.cache_bytes, folder=folder)
    return cache
