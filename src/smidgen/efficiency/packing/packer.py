"""Packer: short examples end to end in one row, without padding between them, as if each were alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from smidgen.data.encoded import Example, tokens_of
from smidgen.data.labels import IGNORED

Batch = dict[str, Tensor | bool]


@dataclass(frozen=True)
class Packer:
    """Makes batches of packed rows for a causal language model.

    Attributes:
        mask: dtype of an attention mask (B, 1, T, T) that is added to attention scores: 0 within an example and back,
            the lowest number elsewhere. None for models that find packed examples by positions that begin again.
    """

    mask: torch.dtype | None = None

    def __call__(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """A batch: input_ids, position_ids from 0 in each example, labels (B, T), and use_cache=False.

        The label of an example's first token is -100, as the model would predict it from the example before. What
        fills a row up counts as one more example.
        """
        length = max(sum(len(tokens_of(example)) for example in row) for row in rows)
        positions = torch.stack([_positions(row, length) for row in rows])
        starts = positions == 0
        labels = _joined(rows, "labels", length, IGNORED)
        labels[starts] = IGNORED
        batch: Batch = {
            # any token fills up, but the padding token would make models warn that its mask is missing
            "input_ids": _joined(rows, "input_ids", length, tokens_of(rows[0][0])[0]),
            "labels": labels,
            "position_ids": positions,
            # a cache of keys, which models make even where nobody reads it, hides from them that a row is packed
            "use_cache": False,
        }
        if self.mask is not None:
            batch["attention_mask"] = _apart(starts, self.mask)
        return batch


def _joined(rows: Sequence[Sequence[Example]], key: str, length: int, filler: int) -> Tensor:
    joined = [torch.tensor([value for example in row for value in tokens_of(example, key)]) for row in rows]
    joined.append(torch.empty(length, dtype=torch.long))  # so that all are padded to `length`
    return pad_sequence(joined, True, filler)[:-1]


def _positions(row: Sequence[Example], length: int) -> Tensor:
    counts = [len(tokens_of(example)) for example in row]
    return torch.cat([torch.arange(count) for count in [*counts, length - sum(counts)]])


def _apart(starts: Tensor, dtype: torch.dtype) -> Tensor:
    """starts: (B, T) bool, an example begins -> (B, 1, T, T)."""
    number = starts.cumsum(1)
    seen = (number[:, :, None] == number[:, None, :]).tril()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
