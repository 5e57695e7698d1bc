"""How to train."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self, TypedDict

from smidgen.common.byte_sizes import parse_bytes
from smidgen.common.errors import TrainError

PACK = "pack"
BATCHING = ("shuffle", "length", PACK)


@dataclass(frozen=True)
class Settings:
    """How to train. None means: chosen automatically, recorded in run.json and reused on resuming.

    `max_new_tokens` bounds what the model writes where the metric reads that (BLEU, ROUGE): by default the longest text
    of the training split and a quarter more.
    `batching="length"` puts rows of like length into a batch, which saves padding (see `ShuffledBatches`).
    `batch_tokens` does so too, and a batch holds as many rows as fit into that many tokens, padding counted; training
    does not read `batch_size` then. `batching="pack"` puts short examples end to end into rows of `max_length` tokens
    (causal language models only, see `PackedBatches`); `batch_size` counts such rows. `cache`
    keeps what lies below the lowest edit, computed once per example: None where that is exact, pays (two epochs or
    more) and needs at most `cache_bytes` for each split; True insists, with a file in `out` beyond that; False never.
    `only_read` computes the last block for the one token that the head reads: None where that is exact.
    `fast_dropout` draws the same distribution as torch in less time on a CPU. `max_memory` (bytes, or "4GB") cuts
    batches into micro-batches whose training step fits by estimate; their gradients add up to the batch's. `recompute`
    keeps only the inputs of blocks and computes them again in the backward pass (see `recomputing`).
    """

    seed: int = 0
    epochs: int = 3
    lr: float | None = None
    head_lr: float | None = None
    batch_size: int = 32
    max_length: int | None = None
    max_new_tokens: int | None = None
    pooling: str | None = None
    warmup: float = 0.06
    clip: float = 1.0
    weight_decay: float = 0.0
    checkpoint_steps: int | None = None
    batching: str = "shuffle"
    batch_tokens: int | None = None
    cache: bool | None = None
    cache_bytes: int = 2**30
    only_read: bool | None = None
    fast_dropout: bool = True
    recompute: bool = False
    max_memory: int | str | None = None

    def __post_init__(self) -> None:
        if self.max_memory is not None:
            object.__setattr__(self, "max_memory", parse_bytes(self.max_memory))
        for name in ("epochs", "batch_size", "batch_tokens", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TrainError(f"{name}={value} must be at least 1")
        for name in ("lr", "head_lr", "clip"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise TrainError(f"{name}={value} must be above 0")
        if not 0 <= self.warmup <= 1:
            raise TrainError(f"warmup={self.warmup} is a share of the steps, from 0 to 1")
        if self.batching not in BATCHING:
            raise TrainError(f"batching={self.batching!r} is not one of {', '.join(BATCHING)}")
        if self.batching == PACK and self.batch_tokens is not None:
            raise TrainError(
                f"batch_tokens={self.batch_tokens} is for rows of like length, batching='pack' for rows of max_length; "
                "with 'pack' set batch_size, which counts packed rows"
            )
        if self.weight_decay < 0 or (self.checkpoint_steps or 1) < 1:
            raise TrainError("weight_decay must not be negative, and checkpoint_steps be at least 1")

    @classmethod
    def of(cls, given: Mapping[str, object]) -> Self:
        """From keywords. Raises TrainError if one is unknown or out of range."""
        make: Callable[..., Self] = cls
        try:
            return make(**given)
        except TypeError as error:
            known = ", ".join(cls.__dataclass_fields__)
            raise TrainError(f"{str(error).partition(') ')[2] or error}; settings: {known}") from None

    def rate(self, step: int, total: int) -> float:
        """Share of the full learning rate at a step: linear warm-up, then linear decay; never 0."""
        rise = max(1, round(self.warmup * total))
        return min((step + 1) / rise, (total - step) / max(1, total - rise + 1), 1.0)


class SharedOptions(TypedDict, total=False):
    """Fields of `Settings` as keywords of what trains at several rates and with several seeds."""

    epochs: int
    head_lr: float | None
    batch_size: int
    max_length: int | None
    max_new_tokens: int | None
    pooling: str | None
    warmup: float
    clip: float
    weight_decay: float
    checkpoint_steps: int | None
    batching: str
    batch_tokens: int | None
    cache: bool | None
    cache_bytes: int
    only_read: bool | None
    fast_dropout: bool
    recompute: bool
    max_memory: int | str | None


class UnseededOptions(SharedOptions, total=False):
    """The same of what trains with several seeds."""

    lr: float | None


class SettingsOptions(UnseededOptions, total=False):
    """The same of one run."""

    seed: int
