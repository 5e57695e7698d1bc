"""Encoded texts -> one padded batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from smidgen.common.errors import DataError
from smidgen.data.encoded import Example, tokens_of
from smidgen.data.labels import IGNORED
from smidgen.sites.task_head import own_pooling, reads_end, takes_positions


@dataclass(frozen=True)
class Collator:
    """Pads encoded texts into a batch of tensors, (B, T) each.

    Padding is on the right: no position, no first token and no causal model notices it there.

    Attributes:
        pads: padding value of each key.
        label_dtype: of one label for each example, (B,); None for labels at positions, (B, T) padded with -100.
        multiple: T is a multiple of this.
        left: padding is on the left instead.
        positions: position_ids, from 0 in each example, are part of the batch.
    """

    pads: dict[str, int]
    label_dtype: torch.dtype | None = None
    multiple: int = 1
    left: bool = False
    positions: bool = False

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        label_dtype: torch.dtype | None = None,
        *,
        multiple: int = 1,
        model: nn.Module | None = None,
        masked: bool = False,
    ) -> Collator:
        """A collator for a tokenizer and, where it is known, a model: left padding if that reads the last place.

        Args:
            masked: whatever stands at padding is masked, so that the end token will do where there is none to pad with.

        Raises:
            DataError: the tokenizer has no token to pad with, or the model tells padding by another one.
        """
        pad = tokenizer.pad_token_id
        if pad is None and masked:
            pad = tokenizer.eos_token_id
        if pad is None:
            raise DataError("the tokenizer has no padding token; set tokenizer.pad_token, such as to its eos_token")
        found = cls(
            {"input_ids": pad, "attention_mask": 0, "token_type_ids": tokenizer.pad_token_type_id},
            label_dtype,
            multiple,
        )
        if model is None:
            return found
        if label_dtype is not None:
            _check_padding(model, pad)
        left = reads_end(model)
        return replace(found, left=left, positions=left and takes_positions(model))

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """A batch. Raises KeyError if the examples differ in their keys."""
        batch = {}
        for key in examples[0]:
            if key == "labels" and self.label_dtype is not None:
                batch[key] = torch.tensor([example[key] for example in examples], dtype=self.label_dtype)
            else:
                values = [tokens_of(example, key) for example in examples]
                batch[key] = self.padded(values, IGNORED if key == "labels" else self.pads[key])
        if self.positions:
            batch["position_ids"] = self.padded([range(len(tokens_of(example))) for example in examples], 0)
        return batch

    def padded(self, values: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
        """Rows of whole numbers as one tensor (B, T)."""
        longest = max(map(len, values))
        filled = np.full((len(values), longest + -longest % self.multiple), pad, dtype=np.int64)
        for row, value in zip(filled, values, strict=True):
            row[len(row) - len(value) if self.left else 0 :][: len(value)] = value
        return torch.from_numpy(filled)


def _check_padding(model: nn.Module, pad: int) -> None:
    """Raises DataError if a classifier that reads the last token which is not padding takes another for padding."""
    if own_pooling(model) != "last":
        return
    known = cast(PretrainedConfig, model.config).get_text_config().pad_token_id
    if known != pad:
        raise DataError(
            f"{type(model).__name__} reads the last token that is not its padding (config.pad_token_id={known}), and "
            f"the tokenizer pads with {pad}; set model.config.pad_token_id = {pad}"
        )
