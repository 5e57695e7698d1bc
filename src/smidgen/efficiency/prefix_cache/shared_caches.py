"""Kept: filled caches that several runs on one model share."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar, cast

from torch import nn

from smidgen.common.errors import TrainError
from smidgen.efficiency.prefix_cache.cache import PrefixCache
from smidgen.efficiency.prefix_cache.cache_key import keys
from smidgen.efficiency.prefix_cache.token_layout import Rows
from smidgen.ports.attachment_record import attachment

Found = TypeVar("Found")


class Kept:
    """Caches of what lies below the lowest edit, filled by the first run that needs them and handed on to the next.

    A run gets what another filled only for the same model object, and if base, cut and inputs have the same digest
    (see `smidgen.efficiency.prefix_cache.cache_key`); one that does not, fills its own, and what nobody uses any more
    is let go. All runs have to collate alike.

    Attributes:
        epochs: of all runs together; below two, nothing is kept.
        folder: for what is too large for memory, if a cache is insisted on.
        fills: how many caches were filled.
    """

    def __init__(self, epochs: int, folder: str | os.PathLike[str] | None = None) -> None:
        self.epochs, self.folder, self.fills = epochs, folder, 0
        self._model: nn.Module | None = None
        self._names: list[str] = []
        self._caches: dict[str, PrefixCache] = {}
        self._once: dict[Hashable, object] = {}
        self._refused: dict[str, TrainError] = {}

    def caches(
        self, model: nn.Module, splits: Sequence[Rows], fill: Callable[[Rows], PrefixCache]
    ) -> list[PrefixCache]:
        """A filled cache for each split of an attached model.

        Args:
            fill: gives a filled cache of rows.

        Raises:
            TrainError: as `fill`, and again without another try.
        """
        names = keys(model, attachment(model).plan, splits)
        known = names if self._model is model else []
        if known != self._names:
            self._once = {}
        self._model, self._names = model, names
        self._caches = {name: cache for name, cache in self._caches.items() if name in known}
        self._refused = {name: error for name, error in self._refused.items() if name in known}
        return [self._one(name, rows, fill) for name, rows in zip(names, splits, strict=True)]

    def once(self, key: Hashable, find: Callable[[], Found]) -> Found:
        """What `find` gives: found once by runs that got the same caches, by each run where nothing is kept."""
        if not self._caches:
            return find()
        if key not in self._once:
            self._once[key] = find()
        return cast(Found, self._once[key])

    def _one(self, name: str, rows: Rows, fill: Callable[[Rows], PrefixCache]) -> PrefixCache:
        """The cache of this name, filled on first use; a refusal is remembered and raised again."""
        if name in self._refused:
            raise self._refused[name]
        if name not in self._caches:
            try:
                self._caches[name] = fill(rows)
            except TrainError as error:
                self._refused[name] = error
                raise
            self.fills += 1
        return self._caches[name]
