"""Which tokens of a text the places of hidden states stand for, once some were merged or left out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenMap:
    """The T tokens of each text of a batch, and the S <= T places that hidden states still have.

    Attributes:
        where: (B, T) int64, the place at which each token is read.
        kept: (B, S) int64, the token that speaks for each place: its position and its row of a mask are the place's.
        mask: (B, T) bool, which tokens are no padding; None for all.
        positions: of the tokens, as the model was called with; None if it counts itself.
    """

    where: Tensor
    kept: Tensor
    mask: Tensor | None = None
    positions: Tensor | None = None

    @classmethod
    def whole(cls, states: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> TokenMap:
        """Each token of hidden states (B, T, d) at its own place.

        Raises:
            ValueError: there is a mask, and it is not one of these tokens.
        """
        batch, tokens = states.shape[:2]
        if mask is not None and mask.shape != (batch, tokens):
            raise ValueError(
                f"the attention mask is {tuple(mask.shape)}, for hidden states of {batch} x {tokens} tokens"
            )
        each = torch.arange(tokens, device=states.device).expand(batch, -1)
        return cls(each, each, None if mask is None else mask != 0, positions)

    @property
    def count(self) -> int:
        """S."""
        return self.kept.shape[1]

    @property
    def shortened(self) -> bool:
        """Whether there are fewer places than tokens."""
        return self.kept.shape[1] < self.where.shape[1]

    @property
    def text(self) -> Tensor | None:
        """(B, S) bool, which places have a token that is no padding; None for all."""
        return None if self.mask is None else self.mask.gather(1, self.kept)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, how many places are no padding."""
        text = self.text
        return self.kept.new_full((len(self.kept),), self.count) if text is None else text.sum(1)

    def shorten(self, places: Tensor, count: int) -> TokenMap:
        """The map after a further step.

        Args:
            places: (B, S) int64, where each of the S places went.
            count: how many are left.

        A place is spoken for by the first of its tokens that is no padding, or the first of all.

        Raises:
            ValueError: the shape is another, or a place is left without a token.
        """
        if places.shape != self.kept.shape:
            raise ValueError(
                f"there are places {tuple(places.shape)} for hidden states of {tuple(self.kept.shape)} tokens"
            )
        where, tokens = places.gather(1, self.where), self.where.shape[1]
        order = torch.arange(tokens, device=where.device).expand_as(where)
        last = order if self.mask is None else order + tokens * ~self.mask
        if not torch.compiler.is_compiling() and not 0 <= int(places.min()) <= int(places.max()) < count:
            raise ValueError(f"places lie between 0 and {count - 1}, found {int(places.min())} to {int(places.max())}")
        first = where.new_full((len(where), count), 2 * tokens).scatter_reduce(1, where, last, "amin")
        if not torch.compiler.is_compiling() and int(first.max()) >= 2 * tokens:
            raise ValueError(f"one of the {count} places is left without a token")
        return TokenMap(where, first % tokens, self.mask, self.positions)

    def spread(self, states: Tensor) -> Tensor:
        """(B, S, ...) -> (B, T, ...): each token reads its place."""
        return states[torch.arange(len(states), device=states.device)[:, None], self.where]

    def pick(self, x: Tensor, axis: int) -> Tensor:
        """The S places of a tensor that has one of the T tokens along an axis behind the first, (B or 1, ...)."""
        axis %= x.ndim
        x = x.expand(len(self.kept), *x.shape[1:])
        index = self.kept.view(len(x), *[1] * (axis - 1), -1, *[1] * (x.ndim - 1 - axis))
        return x.gather(axis, index.expand(*x.shape[:axis], -1, *x.shape[axis + 1 :]))
