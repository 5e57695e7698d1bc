"""Batches of an epoch: a function of (seed, epoch) alone, so that any step can be found again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

POOL = 50  # batches whose rows are sorted by length together


class ShuffledBatches:
    """Lists of row numbers of one epoch, each process its share of every global batch.

    The same global batches come for any number of processes. A global batch with fewer rows than it needs to give
    every process equally many is filled up with its own first rows.

    With `lengths`, batches hold rows of like length: the shuffled rows are cut into pools of 50 batches, each pool is
    sorted by length and cut into batches, and all batches of the epoch are shuffled. Which rows share a pool, the order
    within a length, and the order of batches are random; that short rows meet short rows is not.
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
        lengths: Sequence[int] | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(rows, generator=generator).tolist()
        if lengths is not None:
            pools = [order[i : i + POOL * batch_size] for i in range(0, rows, POOL * batch_size)]
            order = [row for pool in pools for row in sorted(pool, key=lambda row: lengths[row])]
        chunks = [order[i : i + batch_size] for i in range(0, rows, batch_size)]
        if lengths is not None:
            chunks = [chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()]
        self.chunks = [_share(chunk, rank, world) for chunk in chunks[skip:]]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)


def _share(chunk: list[int], rank: int, world: int) -> list[int]:
    short = -len(chunk) % world
    filled = chunk + [chunk[i % len(chunk)] for i in range(short)]
    return filled[rank::world]
