"""Insertion between tokens: places put into tensors of a text, row by row, and taken out of what a model makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenInsertion:
    """Places for n vectors in each row of a batch, behind the first `after` tokens of its text.

    Attributes:
        first: (B, 1), or (1, 1) for all rows alike; the column where the text begins, behind padding on the left.
        n: number of places.
        after: number of tokens before them.
    """

    first: Tensor
    n: int
    after: int

    @classmethod
    def of(cls, mask: Tensor | None, n: int, after: int, device: torch.device) -> TokenInsertion:
        """The text is what a mask (B, T) keeps; all of each row without one."""
        if mask is None:
            return cls(torch.zeros(1, 1, dtype=torch.long, device=device), n, after)
        return cls((mask != 0).int().argmax(1, keepdim=True), n, after)

    def insert(self, x: Tensor, inside: Tensor) -> Tensor:
        """(B, T, ...) -> (B, T + n, ...). `inside` is broadcast to that, and read at the new places."""
        empty = x.new_zeros(len(x), self.n, *x.shape[2:])
        column = self._columns(x.shape[1] + self.n, x)
        ahead, behind = torch.cat((x, empty), 1), torch.cat((empty, x), 1)
        start = self._start(x)
        return torch.where(column < start, ahead, torch.where(column < start + self.n, inside, behind))

    def fill(self, x: Tensor, vectors: Tensor) -> Tensor:
        """(B, T + n, d) with vectors (n, d), or (B or 1, n, d), at the places."""
        rows = torch.arange(len(x), device=x.device)[:, None]
        places = self._start(x[..., 0]) + torch.arange(self.n, device=x.device)
        return x.index_put((rows, places), vectors.to(x.dtype).expand(len(x), -1, -1))

    def remove(self, x: Tensor) -> Tensor:
        """(B, T + n, ...) -> (B, T, ...)."""
        column = self._columns(x.shape[1] - self.n, x)
        return torch.where(column < self._start(x), x[:, : -self.n], x[:, self.n :])

    def repeat(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (B, T + n, ...): the places have what the text's first token has."""
        rows = torch.arange(len(x), device=x.device)[:, None]
        return self.insert(x, x[rows, self.first.to(x.device)])

    def positions(self, places: Tensor) -> Tensor:
        """Positions (..., B, T) -> (..., B, T + n): the places follow on what is before, the rest is n further."""
        if places.ndim > 2:
            return torch.stack([self.positions(part) for part in places])
        places = places.expand(max(len(places), len(self.first)), -1)
        text = places.gather(1, self.first.to(places.device).expand(len(places), 1))
        behind = self._columns(places.shape[1], places) >= self._start(places)
        column = self._columns(places.shape[1] + self.n, places)
        return self.insert(places + self.n * behind, text + column - self.first.to(places.device))

    def _columns(self, count: int, x: Tensor) -> Tensor:
        return torch.arange(count, device=x.device).view(1, -1, *[1] * (x.ndim - 2))

    def _start(self, x: Tensor) -> Tensor:
        return (self.first.to(x.device) + self.after).view(-1, 1, *[1] * (x.ndim - 2))
