"""Batches of an epoch: a function of (seed, epoch) alone, so that any step can be found again."""

from __future__ import annotations

from collections.abc import Iterator

import torch


class ShuffledBatches:
    """Lists of row numbers of one epoch, each process its share of every global batch.

    The same global batches come for any number of processes. A global batch with fewer rows than it needs to give
    every process equally many is filled up with its own first rows.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        seed: int,
        epoch: int,
        *,
        skip: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(rows, generator=generator).tolist()
        chunks = [order[i : i + batch_size] for i in range(0, rows, batch_size)]
        self.chunks = [_share(chunk, rank, world) for chunk in chunks[skip:]]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)


def _share(chunk: list[int], rank: int, world: int) -> list[int]:
    short = -len(chunk) % world
    filled = chunk + [chunk[i % len(chunk)] for i in range(short)]
    return filled[rank::world]
