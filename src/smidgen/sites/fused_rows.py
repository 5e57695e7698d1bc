"""The output rows of a fused projection that are one part of it: query, key, value, or half of a gated map."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Rows `start` to `stop` of each of `groups` equal blocks of rows.

    One block where the parts stand one behind the other (GPT-2, Phi-3); a block for each key head where rows go head by
    head (GPT-NeoX: query, key and value of head 0, then of head 1; Falcon: all queries of a key head, its key, its
    value). What is taken is in the order of the heads.
    """

    start: int
    stop: int
    groups: int = 1

    @property
    def length(self) -> int:
        """How many rows these are."""
        return self.groups * (self.stop - self.start)

    def take(self, whole: Tensor, dim: int = 0) -> Tensor:
        """These places of a tensor that has all rows along `dim`: (..., rows, ...) -> (..., length, ...)."""
        if self.groups == 1:
            return whole.narrow(dim, self.start, self.stop - self.start)
        dim %= whole.ndim
        blocks = whole.unflatten(dim, (self.groups, -1))
        return blocks.narrow(dim + 1, self.start, self.stop - self.start).flatten(dim, dim + 1)

    def put(self, whole: Tensor, part: Tensor, dim: int = 0) -> Tensor:
        """The tensor with these places replaced, out of place: (..., rows, ...) and (..., length, ...)."""
        dim %= whole.ndim
        blocks, new = (t.unflatten(dim, (self.groups, -1)) for t in (whole, part))
        after = blocks.shape[dim + 1] - self.stop
        around = (blocks.narrow(dim + 1, 0, self.start), new, blocks.narrow(dim + 1, self.stop, after))
        return torch.cat(around, dim=dim + 1).flatten(dim, dim + 1)

    def numbers(self, total: int) -> Tensor:
        """The numbers of these rows among all, (length,)."""
        return self.take(torch.arange(total))

    def overlaps(self, other: Rows) -> bool:
        """Whether two parts of one projection share rows."""
        return self.groups != other.groups or (self.start < other.stop and other.start < self.stop)
