"""Batches of an epoch: a function of (seed, epoch) alone, so that any step can be found again."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from smidgen.common.errors import TrainError

POOL = 50  # batches whose rows are sorted by length together
_Row = TypeVar("_Row")


class ShuffledBatches:
    """Lists of row numbers of one epoch, each process its share of every global batch.

    The same global batches come for any number of processes, each row in one of them: shares differ by one row at most,
    and that of a batch with fewer rows than processes may be empty.

    With `lengths`, batches hold rows of like length: the shuffled rows are cut into pools of 50 batches, each pool is
    sorted by length and cut into batches, and all batches of the epoch are shuffled. Which rows share a pool, the order
    within a length, and the order of batches are random; that short rows meet short rows is not.

    With `tokens` too, a batch holds as many rows as keep rows x longest row within that, and `batch_size` is not read.

    Raises:
        TrainError: a row alone is longer than `tokens`.
    """

    def __init__(  # noqa: PLR0913 - options by keyword
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
        tokens: int | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(rows, generator=generator).tolist()
        if lengths is None:
            chunks = _cut(order, batch_size)
        else:
            pools = _cut(order, POOL * (batch_size if tokens is None else _usual(lengths, tokens)))
            sets = [sorted(pool, key=lengths.__getitem__) for pool in pools]
            chunks = [c for s in sets for c in (_cut(s, batch_size) if tokens is None else _fill(s, lengths, tokens))]
            chunks = _shuffled(chunks, generator)
        self.chunks = [_share(chunk, rank, world) for chunk in chunks[skip:]]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)


class PackedBatches:
    """Lists of packed rows of one epoch, each a list of numbers of examples; each process its share, as above.

    Best fit: the shuffled examples are put one after another into the fullest row that has room, or else into a new
    one. Then rows are shuffled and cut into batches of `batch_size` rows. In which order examples are put, and in which
    order rows come, is random; which of the rows with room takes an example follows from its length alone.

    Args:
        lengths: tokens of each example, none above `capacity`.
        capacity: the most tokens of a row.
    """

    def __init__(  # noqa: PLR0913 - options by keyword
        self,
        lengths: Sequence[int],
        capacity: int,
        batch_size: int,
        seed: int,
        epoch: int,
        *,
        skip: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(lengths), generator=generator).tolist()
        chunks = _cut(_shuffled(_best_fit(order, lengths, capacity), generator), batch_size)
        self.chunks = [_share(chunk, rank, world) for chunk in chunks[skip:]]

    def __iter__(self) -> Iterator[list[list[int]]]:
        return iter(self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)


def _best_fit(order: list[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of a packed batch, each the numbers of examples whose lengths add up to at most `capacity` tokens."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, row), sorted
    for example in order:
        at = bisect_left(free, (lengths[example], 0))
        room, row = free.pop(at) if at < len(free) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        insort(free, (room - lengths[example], row))
    return rows


def _usual(lengths: Sequence[int], tokens: int) -> int:
    """Rows of a usual batch of so many tokens."""
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] > tokens:
        raise TrainError(
            f"row {longest} has {lengths[longest]} tokens, more than batch_tokens={tokens}; "
            f"set batch_tokens to at least {lengths[longest]}, or max_length to at most {tokens}"
        )
    return max(1, tokens * len(lengths) // sum(lengths))


def _fill(rows: list[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows in the order of their lengths -> batches, each as large as fits."""
    batches: list[list[int]] = []
    for row in rows:
        if not batches or (len(batches[-1]) + 1) * lengths[row] > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def _cut(rows: list[_Row], size: int) -> list[list[_Row]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _shuffled(items: list[_Row], generator: torch.Generator) -> list[_Row]:
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]


def _share(chunk: list[_Row], rank: int, world: int) -> list[_Row]:
    return chunk[rank::world]
