"""Pairs: two texts and how alike they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from datasets import Dataset, Value
from torch import Tensor

from smidgen.common.errors import DataError
from smidgen.data.columns import Columns, label_column, reads_as_number
from smidgen.data.kinds.base import Outputs, Pair
from smidgen.data.kinds.two_towers import TowerOutput, TwoTowers
from smidgen.data.labels import Labels, label_numbers
from smidgen.data.metrics import MSE, PEARSON, SPEARMAN


class Pairs(TwoTowers):
    """Two texts and a number that says how alike they are: the cosine of their vectors is brought to it.

        loss = mean (cos(u, v) - y)^2,  y in 0 .. 1          Reimers and Gurevych 2019, arXiv:1908.10084, section 3.1

    Numbers beyond -1 .. 1 are scaled, by the least and the greatest of the split to learn from.
    """

    name = "pairs"
    metrics = (SPEARMAN, PEARSON, MSE)
    usual = ("spearman", "pearson")

    def columns(self, rows: Dataset, text: Sequence[str] | None, label: str | None) -> Columns:
        """Two texts and a number, by known names."""
        texts, label = self.two_columns(rows, text), label_column(rows, label)
        low, high = _range(rows, label)
        note = "" if _fits(low, high) else f"holds numbers from {low:g} to {high:g}, learned as cosines from 0 to 1"
        return Columns(self.name, texts, label, note)

    def label_set(self, rows: Dataset, columns: Columns) -> Labels:
        """No names; least and greatest number as values."""
        return Labels(_range(rows, str(columns.label)))

    def label_ids(self, rows: Dataset, split: str, columns: Columns, labels: Labels) -> Sequence[object]:
        """Numbers from 0 to 1, or as they are where they lie between -1 and 1."""
        numbers, (low, high) = label_numbers(rows, split, columns), map(float, labels.values)
        return numbers if _fits(low, high) else [(number - low) / (high - low) for number in numbers]

    def label_feature(self) -> object:
        """Double precision."""
        return Value("float64")

    def loss(self, outputs: TowerOutput, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Mean squared error of the cosine."""
        labels = batch.get("labels")
        return None if labels is None else F.mse_loss(outputs.logits.squeeze(-1), labels.to(outputs.logits.dtype))

    def pairs(self, outputs: Outputs, labels: Tensor | None, names: Sequence[str]) -> Sequence[Pair]:
        """Cosines."""
        predicted = outputs.logits.squeeze(-1).tolist()
        return list(zip(predicted, [None] * len(predicted) if labels is None else labels.tolist(), strict=True))


def _range(rows: Dataset, label: str) -> tuple[float, float]:
    found = [float(value) for value in rows[label][:] if reads_as_number(value)]
    if not found or min(found) == max(found):
        raise DataError(f"label column {label!r} must hold numbers that say how alike the texts are, not all the same")
    return min(found), max(found)


def _fits(low: float, high: float) -> bool:
    return low >= -1 and high <= 1
