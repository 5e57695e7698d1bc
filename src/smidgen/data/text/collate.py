"""Encoded examples -> one padded batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from smidgen.common.errors import DataError
from smidgen.data.labels import IGNORED
from smidgen.data.text.encoding import _check_padding
from smidgen.sites.task_head import reads_end, takes_positions


@dataclass(frozen=True)
class Collator:
    """Pads encoded examples into a batch of tensors, (B, T) each; labels (B, T) with -100, or (B,).

    Padding is on the right: no position, no first token and no causal model notices it there.

    Attributes:
        pads: padding value of each key.
        kind: of the task.
        multiple: T is a multiple of this.
        left: padding is on the left instead.
        positions: position_ids, from 0 in each example, are part of the batch.
    """

    pads: dict[str, int]
    kind: str
    multiple: int = 1
    left: bool = False
    positions: bool = False

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, kind: str, multiple: int = 1, model: nn.Module | None = None
    ) -> Collator:
        """A collator for a tokenizer and, where it is known, a model: left padding if that reads the last place.

        For causal-lm a missing padding token is the end token, masked anyway.

        Raises:
            DataError: the tokenizer has no token to pad with, or the model tells padding by another one.
        """
        pad = tokenizer.pad_token_id
        if pad is None and kind == "causal-lm":
            pad = tokenizer.eos_token_id
        if pad is None:
            raise DataError("the tokenizer has no padding token; set tokenizer.pad_token, such as to its eos_token")
        pads = {"input_ids": pad, "attention_mask": 0, "token_type_ids": tokenizer.pad_token_type_id}
        if model is None:
            return cls(pads, kind, multiple)
        _check_padding(model, kind, pad)
        left = reads_end(model)
        return cls(pads, kind, multiple, left, left and takes_positions(model))

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch. Raises KeyError if the examples differ in their keys."""
        batch = {}
        for key in examples[0]:
            values = [example[key] for example in examples]
            if key == "labels" and self.kind in ("classification", "regression"):
                dtype = torch.float32 if self.kind == "regression" else torch.long
                batch[key] = torch.tensor(values, dtype=dtype)
            else:
                batch[key] = self._pad(values, IGNORED if key == "labels" else self.pads[key])
        if self.positions:
            batch["position_ids"] = self._pad([range(len(example["input_ids"])) for example in examples], 0)
        return batch

    def _pad(self, values: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
        longest = max(map(len, values))
        padded = np.full((len(values), longest + -longest % self.multiple), pad, dtype=np.int64)
        for row, value in zip(padded, values, strict=True):
            row[len(row) - len(value) if self.left else 0 :][: len(value)] = value
        return torch.from_numpy(padded)
