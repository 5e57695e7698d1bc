"""How to train."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from smidgen.errors import TrainError

BATCHING = ("shuffle", "length")


@dataclass(frozen=True)
class Settings:
    """How to train. None means: chosen automatically, recorded in run.json and reused on resuming.

    `batching="length"` puts rows of like length into a batch, which saves padding (see `ShuffledBatches`). `cache`
    keeps what lies below the lowest edit, computed once per example: None where that is exact, pays (two epochs or
    more) and needs at most `cache_bytes` for each split; True insists, with a file in `out` beyond that; False never.
    """

    seed: int = 0
    epochs: int = 3
    lr: float | None = None
    head_lr: float | None = None
    batch_size: int = 32
    max_length: int | None = None
    pooling: str | None = None
    warmup: float = 0.06
    clip: float = 1.0
    weight_decay: float = 0.0
    checkpoint_steps: int | None = None
    batching: str = "shuffle"
    cache: bool | None = None
    cache_bytes: int = 2**30

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise TrainError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lr", "head_lr", "clip"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise TrainError(f"{name}={value} must be above 0")
        if not 0 <= self.warmup <= 1:
            raise TrainError(f"warmup={self.warmup} is a share of the steps, from 0 to 1")
        if self.batching not in BATCHING:
            raise TrainError(f"batching={self.batching!r} is not one of {', '.join(BATCHING)}")
        if self.weight_decay < 0 or (self.checkpoint_steps or 1) < 1:
            raise TrainError("weight_decay must not be negative, and checkpoint_steps be at least 1")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """From keywords. Raises TrainError if one is unknown or out of range."""
        try:
            return cls(**given)
        except TypeError as error:
            known = ", ".join(cls.__dataclass_fields__)
            raise TrainError(f"{str(error).partition(') ')[2] or error}; settings: {known}") from None

    def rate(self, step: int, total: int) -> float:
        """Share of the full learning rate at a step: linear warm-up, then linear decay; never 0."""
        rise = max(1, round(self.warmup * total))
        return min((step + 1) / rise, (total - step) / max(1, total - rise + 1), 1.0)
