"""Retrieval: a text and the one that answers it, told from all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from smidgen.common.errors import DataError
from smidgen.data.columns import TARGETS, Columns, known_columns
from smidgen.data.kinds.base import Outputs, Pair
from smidgen.data.kinds.two_towers import TowerOutput, TwoTowers
from smidgen.data.labels import Labels, present_labels
from smidgen.data.ranking import MRR, RECALL_AT_1, RECALL_AT_10, RankedPair


class Retrieval(TwoTowers):
    """A text and another that belongs to it, such as question and answer; those of the batch's others are wrong ones.

        loss = mean_i -log( exp(u_i v_i / t) / sum_j exp(u_i v_j / t) )       t = 0.05

    van den Oord et al. 2018, arXiv:1807.03748 (InfoNCE); negatives of the batch as in Henderson et al. 2017,
    arXiv:1705.00652, section 4.4. u, v: vectors of length 1. Another text that is equal to a right one is left out of
    the sum, as is what belongs to an equal first text. With a label column of 0 and 1, a row of label 0 is a wrong
    pair: its second text stands in the sums, its first one asks nothing.
    """

    name = "retrieval"
    metrics = (MRR, RECALL_AT_1, RECALL_AT_10)
    usual = ("mrr", "recall_at_1", "recall_at_10")
    couples_batch = True
    improbable = "the loss of a retrieval task is that of a batch: its others are the wrong answers"
    temperature: ClassVar[float] = 0.05

    def columns(self, rows: Dataset, text: Sequence[str] | None, label: str | None) -> Columns:
        """Two texts by known names; a label only if it is given, or known by name and all 0 or 1."""
        texts = self.two_columns(rows, text)
        known = [
            name for name in known_columns(rows.column_names, TARGETS) if name not in texts and _binary(rows, name)
        ]
        return Columns(self.name, texts, label or (known[0] if len(known) == 1 else None))

    def label_ids(self, rows: Dataset, split: str, columns: Columns, labels: Labels) -> Sequence[object]:
        """1 for a right pair, 0 for a wrong one. Raises DataError for any other label."""
        values = present_labels(rows, split, columns)
        odd = [i for i, value in enumerate(values) if str(value) not in ("0", "1", "0.0", "1.0")]
        if odd:
            raise DataError(f"{split} row {odd[0]}: label {values[odd[0]]!r} is neither 1 (a right pair) nor 0 (a "
                            "wrong one); kind='pairs' takes numbers that say how alike two texts are")  # fmt: skip
        return [int(float(value)) for value in values]

    def loss(self, outputs: TowerOutput, batch: Mapping[str, Tensor]) -> Tensor | None:
        """InfoNCE over the batch; 0 where it has no wrong answers."""
        scores = outputs.vectors[:, 0] @ outputs.vectors[:, 1].T / self.temperature  # (B, B)
        same = (outputs.keys[:, None] == outputs.keys[None]).any(-1)  # an equal first or second text
        same.fill_diagonal_(False)
        scores = scores.masked_fill(same, float("-inf"))
        right = torch.ones(len(scores), device=scores.device) if "labels" not in batch else batch["labels"].float()
        losses = F.cross_entropy(scores, torch.arange(len(scores), device=scores.device), reduction="none")
        return (losses * right).sum() / right.sum().clamp(min=1)

    def pairs(self, outputs: Outputs, labels: Tensor | None, names: Sequence[str]) -> Sequence[Pair]:
        """Vectors and keys; 1 for a right pair, which all are without labels."""
        assert isinstance(outputs, TowerOutput)
        vectors, keys = outputs.vectors.float().cpu().numpy(), outputs.keys.tolist()
        both = zip(vectors, keys, strict=True)
        found = [RankedPair(first, second, key, other) for (first, second), (key, other) in both]
        return list(zip(found, [1] * len(found) if labels is None else map(int, labels.tolist()), strict=True))


def _binary(rows: Dataset, name: str) -> bool:
    return {str(value) for value in rows[name][:]} <= {"0", "1", "0.0", "1.0"}
