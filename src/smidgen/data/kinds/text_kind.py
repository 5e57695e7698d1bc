"""TextKind: what kinds of task about texts have in common."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from datasets import Dataset
from torch import nn

from smidgen.data.columns import Columns, LabelType, check_text_types, find_texts, label_column, label_type
from smidgen.data.encoded import Encoded
from smidgen.data.kinds.base import Answer, Collate, Question, TaskKind, label_answers
from smidgen.data.processor import Processor, tokenizer_in
from smidgen.data.text.collate import Collator
from smidgen.data.text.encoding import encode_chunks, encode_texts, text_length


class TextKind(TaskKind, abstract=True):
    """One text or two in one sequence, with a label. `holds`: what label column makes a task of this kind."""

    holds: ClassVar[LabelType]
    lists: ClassVar[bool] = False  # texts are lists of words
    general: ClassVar[bool] = True
    plain_cells: ClassVar[bool] = True

    def claims(self, rows: Dataset, text: Sequence[str] | None, label: str | None) -> Columns | None:
        """By the type of the label column. Raises DataError if that is none of names, numbers or tags."""
        label = label_column(rows, label)
        found, note = label_type(rows, label)
        return self._columns(rows, text, label, note) if found is self.holds else None

    def columns(self, rows: Dataset, text: Sequence[str] | None, label: str | None) -> Columns:
        """By known names."""
        return self._columns(rows, text, label_column(rows, label), "")

    def _columns(self, rows: Dataset, text: Sequence[str] | None, label: str, note: str) -> Columns:
        if self.lists and not text:
            find_texts(rows, label, lists=True)
        found = tuple(text) if text else find_texts(rows, label, lists=self.lists)
        check_text_types(rows, self.name, found, most=1 if self.lists else 2, lists=self.lists)
        return Columns(self.name, found, label, note)

    def encode(
        self, rows: Dataset, processor: Processor, text: Sequence[str], label: str | None, max_length: int | None
    ) -> Encoded:
        """Token ids, cut on the right, the longer of a pair first; by default at the tokenizer's limit, at most 512."""
        tokenizer = tokenizer_in(processor, self.name)
        length = text_length(tokenizer, max_length)
        return encode_chunks(
            rows, length, partial(encode_texts, tokenizer=tokenizer, text=text, label=label, length=length)
        )

    def collator(self, processor: Processor, multiple: int = 1, model: nn.Module | None = None) -> Collate:
        """Pads to the longest, or to a multiple of `multiple`."""
        return Collator.of(tokenizer_in(processor, self.name), self.label_dtype, multiple=multiple, model=model)

    def answers(self, question: Question) -> list[Answer]:
        """Labels with their probabilities, or numbers."""
        return label_answers(question, list(map(str, question.inputs)))
