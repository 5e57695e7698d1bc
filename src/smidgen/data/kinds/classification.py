"""Classification: one text or two, one of several labels."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset
from torch import Tensor

from smidgen.data.columns import Columns, LabelType
from smidgen.data.kinds.base import Outputs, Pair, class_pairs
from smidgen.data.kinds.text_kind import TextKind
from smidgen.data.labels import Labels, class_ids, named_labels
from smidgen.data.metrics import ACCURACY, F1, F1_MACRO, MATTHEWS


class Classification(TextKind):
    """One text or two, one of several labels."""

    name = "classification"
    model_class = "AutoModelForSequenceClassification"
    metrics = (ACCURACY, F1, F1_MACRO, MATTHEWS)
    usual = ("accuracy", "f1", "matthews")
    stratified = True
    unpackable = "a classification head reads one token, or the mean, of a row"
    holds = LabelType.NAMES

    def label_set(self, rows: Dataset, columns: Columns) -> Labels:
        """Declared names, else those that occur."""
        return named_labels(rows, columns)

    def label_ids(self, rows: Dataset, split: str, columns: Columns, labels: Labels) -> Sequence[object]:
        """Ids of labels."""
        return class_ids(rows, split, columns, labels)

    def head_options(self, labels: Sequence[str]) -> dict[str, object]:
        """One output for each label."""
        return {**super().head_options(labels), **({"problem_type": "single_label_classification"} if labels else {})}

    def pairs(self, outputs: Outputs, labels: Tensor | None, names: Sequence[str]) -> Sequence[Pair]:
        """Ids; logits (B, C)."""
        return class_pairs(outputs.logits, labels)
