"""Examples of different lengths end to end: how long each is, where it lies, and where its tokens are in a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smidgen.data.encoded import Example, tokens_of
from smidgen.efficiency.prefix_cache.cut_point import Cut

Rows = Sequence[Example]


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Where the tokens of each example lie, longest example first.

    Attributes:
        lengths: tokens of each example.
        order: numbers of the examples as they lie.
        starts: number of each example's first token.
        tokens: of all examples.
    """

    lengths: list[int]
    order: list[int]
    starts: list[int]
    tokens: int

    @classmethod
    def of(cls, lengths: list[int]) -> TokenLayout:
        """The layout of examples of these lengths."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        starts, tokens = [0] * len(lengths), 0
        for i in order:
            starts[i] = tokens
            tokens += lengths[i]
        return cls(lengths, order, starts, tokens)

    def chunks(self, size: int) -> Iterator[list[int]]:
        """Examples of like length, `size` at a time."""
        for start in range(0, len(self.order), size):
            yield self.order[start : start + size]


def lengths_of(rows: Rows) -> list[int] | None:
    """Tokens of each example; None if they have no `input_ids` (images), so that all are alike."""
    if not len(rows) or "input_ids" not in rows[0]:
        return None
    return [_length(row) for row in (rows[i] for i in range(len(rows)))]


def _length(row: Example) -> int:
    masked = row.get("attention_mask") is not None
    return int(sum(tokens_of(row, "attention_mask"))) if masked else len(tokens_of(row))


def kept_of(cut: Cut, batch: dict[str, Tensor], shape: tuple[int, ...], lengths: Sequence[int]) -> Tensor:
    """Which places of a batch hold tokens, (B, T) bool; without an attention mask the first ones of each row.

    Raises:
        TrainError: they do not fit the examples' lengths, or a row's tokens do not lie together.
    """
    counts = torch.tensor(lengths)
    mask = batch.get("attention_mask")
    kept = torch.arange(shape[1])[None] < counts[:, None] if mask is None else mask.bool().cpu()
    if kept.shape != shape[:2]:
        raise cut.refusal(f"hidden states of shape {tuple(shape)} under a mask of shape {tuple(kept.shape)}")
    if not torch.equal(kept.sum(1), counts):
        i = int((kept.sum(1) != counts).nonzero()[0])
        raise cut.refusal(f"the collator makes {int(kept[i].sum())} tokens of an example of {lengths[i]}")
    if ((kept[:, 1:] != kept[:, :-1]).sum(1) > 1).any() or not counts.all():
        raise cut.refusal("the padding of an example does not lie on one side of its tokens")
    return kept


def pads_left(cut: Cut, kept: Tensor, known: bool | None = None) -> bool:
    """Whether padding lies on the left. Raises TrainError if it lies on both sides, or not where it is known to."""
    left, right = not bool(kept[:, 0].all()), not bool(kept[:, -1].all())
    if (left and right) or (known is not None and (right if known else left)):
        raise cut.refusal("the collator pads some examples on the left and some on the right")
    return left
