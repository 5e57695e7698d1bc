"""MediaClassification: what classification of images and of sounds have in common."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from datasets import Dataset, Features, Value
from torch import Tensor

from smidgen.common.errors import DataError
from smidgen.data.columns import Columns, check_inputs, label_column, only_column
from smidgen.data.encoded import Column, Encoded, Example
from smidgen.data.kinds.base import Answer, Outputs, Pair, Question, TaskKind, class_pairs, label_answers
from smidgen.data.labels import Labels, class_ids, named_labels
from smidgen.data.media.class_folders import MediaForm, read_media
from smidgen.data.media.media_file import CELL, MediaFile
from smidgen.data.metrics import ACCURACY, F1, F1_MACRO, MATTHEWS
from smidgen.data.processor import Processor
from smidgen.data.readers import Raw


class MediaClassification(TaskKind, abstract=True):
    """An image or a sound, one of several labels. Examples keep the file, which the collator reads."""

    form: ClassVar[MediaForm]
    feature: ClassVar[type]  # of datasets, whose columns are of this kind
    metrics = (ACCURACY, F1, F1_MACRO, MATTHEWS)
    usual = ("accuracy", "f1_macro")
    stratified = True

    def read(self, path: Path, seed: int) -> Raw | None:
        """A folder or a .zip with a folder for each class."""
        return read_media(path, self.form, seed)

    def claims(self, rows: Dataset, text: Sequence[str] | None, label: str | None) -> Columns | None:
        """A column of images, or of sounds, as datasets marks them."""
        return self.columns(rows, text, label) if self._marked(rows) else None

    def columns(self, rows: Dataset, text: Sequence[str] | None, label: str | None) -> Columns:
        """The one column of that type, or of paths where it is named."""
        there = rows.column_names
        found = self._marked(rows) or [name for name in there if rows.features[name] == dict(CELL)]
        named = tuple(text) if text else (only_column(found, there, "text"),)
        if len(named) != 1:
            raise DataError(f"{self.name} reads one column, found {len(named)}: {', '.join(named)}")
        feature = rows.features[named[0]]
        paths = isinstance(feature, Value) and "string" in feature.dtype
        if named[0] not in found and not paths:
            holds = getattr(feature, "dtype", feature)
            raise DataError(f"column {named[0]!r} holds {holds}; expected {self.form.what}, or paths of their files")
        return Columns(self.name, named, label_column(rows, label))

    def _marked(self, rows: Dataset) -> list[str]:
        return [name for name, feature in rows.features.items() if isinstance(feature, self.feature)]

    def inputs(self, rows: Dataset, split: str, columns: Columns) -> Dataset:
        """The column as files, every one of which begins as it should."""
        (name,) = columns.text
        if isinstance(rows.features.get(name), self.feature):
            rows = rows.cast_column(name, self.feature(decode=False))
        check_inputs(rows, split, columns, self.form.column)
        files = [MediaFile.of(value, f"{split} row {i}") for i, value in enumerate(rows[name][:])]
        for file in files:
            self.check(file)
        return Dataset.from_dict({name: [file.cell() for file in files]}, Features({name: CELL}))

    @abstractmethod
    def check(self, file: MediaFile) -> None:
        """Raises DataError, naming the file, if it does not begin as it should."""

    def label_set(self, rows: Dataset, columns: Columns) -> Labels:
        """Declared names, else those that occur."""
        return named_labels(rows, columns)

    def label_ids(self, rows: Dataset, split: str, columns: Columns, labels: Labels) -> Sequence[object]:
        """Ids of labels."""
        return class_ids(rows, split, columns, labels)

    def keys(self, rows: Dataset, columns: Columns) -> list[list[str]]:
        """By content."""
        return [[MediaFile.of(cell).digest()] for cell in rows[columns.text[0]][:]]

    def digest(self, row: Mapping[str, object]) -> bytes:
        """The content of files, not where they lie."""
        plain = {k: MediaFile.of(v).digest() if isinstance(v, Mapping) else v for k, v in row.items()}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).digest()

    def encode(
        self, rows: Dataset, processor: Processor, text: Sequence[str], label: str | None, max_length: int | None
    ) -> Encoded:
        """Files and labels. Raises DataError if a length is given, or the processor is of another kind."""
        self.check_processor(processor)
        if max_length is not None:
            raise DataError(f"{self.form.what} have no tokens to cut: leave out max_length={max_length}")
        files = [MediaFile.of(cell, f"{self.form.column} {i}") for i, cell in enumerate(rows[text[0]][:])]
        labels: list[Example] = [{}] * len(files) if label is None else [{"labels": value} for value in rows[label][:]]
        examples = [{self.form.column: file, **value} for file, value in zip(files, labels, strict=True)]
        return Encoded(examples, None, lengths=[1] * len(examples))

    @abstractmethod
    def check_processor(self, processor: Processor) -> None:
        """Raises DataError if a processor does not read such files."""

    def length(self, example: Mapping[str, object]) -> int:
        """All are alike."""
        return 1

    def head_options(self, labels: Sequence[str]) -> dict[str, object]:
        """One output for each label."""
        return {**super().head_options(labels), **({"problem_type": "single_label_classification"} if labels else {})}

    def pairs(self, outputs: Outputs, labels: Tensor | None, names: Sequence[str]) -> Sequence[Pair]:
        """Ids; logits (B, C)."""
        return class_pairs(outputs.logits, labels)

    def read_inputs(self, path: Path) -> Column | None:
        """A file, or all those in a folder."""
        if path.is_dir():
            found = [str(p) for p in sorted(path.rglob("*")) if p.is_file() and self.form.holds(p.name)]
            if not found:
                raise DataError(f"{path} holds no {self.form.what}; known are {' '.join(sorted(self.form.suffixes))}")
            return found
        return [str(path)] if self.form.holds(path.name) else None

    def answers(self, question: Question) -> list[Answer]:
        """Labels with their probabilities."""
        files = [self.as_file(value, f"{self.form.column} {i}") for i, value in enumerate(question.inputs)]
        return label_answers(question, [file.name for file in files], {"text": [file.cell() for file in files]})

    def as_file(self, value: object, name: str) -> MediaFile:
        """A new input: a path, bytes, or a cell of a column."""
        return MediaFile.of(value, name)
