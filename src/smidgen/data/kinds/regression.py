"""Regression: one text or two, a number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from datasets import Dataset, Value
from torch import Tensor

from smidgen.data.columns import Columns, LabelType
from smidgen.data.kinds.base import Outputs, Pair
from smidgen.data.kinds.text_kind import TextKind
from smidgen.data.labels import Labels, label_numbers
from smidgen.data.metrics import MSE, PEARSON, SPEARMAN


class Regression(TextKind):
    """One text or two, a number."""

    name = "regression"
    model_class = "AutoModelForSequenceClassification"
    metrics = (PEARSON, SPEARMAN, MSE)
    usual = ("pearson", "spearman", "mse")
    normal = True
    unpackable = "a regression head reads one token, or the mean, of a row"
    holds = LabelType.NUMBERS
    label_dtype = torch.float32

    def label_ids(self, rows: Dataset, split: str, columns: Columns, labels: Labels) -> Sequence[object]:
        """Finite numbers."""
        return label_numbers(rows, split, columns)

    def label_feature(self) -> object:
        """Double precision."""
        return Value("float64")

    def width(self, labels: Sequence[str]) -> int | None:
        """One number."""
        return 1

    def head_options(self, labels: Sequence[str]) -> dict[str, object]:
        """One output."""
        return {"num_labels": 1, "problem_type": "regression"}

    def pairs(self, outputs: Outputs, labels: Tensor | None, names: Sequence[str]) -> Sequence[Pair]:
        """Numbers; logits (B, 1)."""
        predicted = outputs.logits.squeeze(-1).tolist()
        return list(zip(predicted, [None] * len(predicted) if labels is None else labels.tolist(), strict=True))
