"""Task: splits with texts and labels, the kind of task they make, its labels and its metric."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from datasets import Dataset
from torch import nn

from smidgen.common.errors import DataError, nearest
from smidgen.data.column_inference import infer_columns
from smidgen.data.columns import Columns
from smidgen.data.encoded import Encoded
from smidgen.data.kinds.base import Collate, TaskKind, kind_named
from smidgen.data.labels import Labels, is_unlabelled
from smidgen.data.processor import Processor
from smidgen.data.readers import SPLITS, Raw, quiet, read_splits
from smidgen.data.scoring import check_metric, default_metric
from smidgen.data.splits import first, share_of
from smidgen.data.validation_cut import cut_validation

Limit = Mapping[str, int] | int | None


@dataclass(frozen=True)
class MixedSource:
    """One of the tasks that a task was mixed of.

    Attributes:
        weight: in what proportion its training examples stand; None if all were taken.
        rows: split -> how many of its rows were taken.
    """

    name: str
    weight: float | None
    rows: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Task:
    """Data of one task.

    Attributes:
        name: short name.
        kind: name of a registered `TaskKind`: "classification", "regression", "tokens", "causal-lm", ...
        text: input columns: of one or two texts; of lists of words for tokens; for causal-lm one of plain text, two
            of prompt and completion, or ("messages",); for chat ("messages",) whatever the source has.
        label: the label column; None where there is none.
        labels: label names in id order; () where labels are no names.
        metric: name of the metric that counts.
        splits: "train", "validation", "test" as far as they exist, with the input columns and the label
            column, which holds ids (classification), floats (regression) or lists of ids (tokens).
        notes: what the source had and the task has not, such as a split without labels -> why.
        sources: of a mixture (see `mix_tasks`), what came from where.
    """

    name: str
    kind: str
    text: tuple[str, ...]
    label: str | None
    labels: tuple[str, ...]
    metric: str
    splits: Mapping[str, Dataset] = field(repr=False)
    notes: Mapping[str, str] = field(default_factory=dict)
    sources: tuple[MixedSource, ...] = ()

    @classmethod
    def load(  # noqa: PLR0913 - options by keyword
        cls,
        source: str | os.PathLike[str],
        *,
        kind: str | None = None,
        text: str | Sequence[str] | None = None,
        label: str | None = None,
        metric: str | None = None,
        name: str | None = None,
        seed: int = 0,
        validation: float = 0.1,
        limit: Limit = None,
    ) -> Task:
        """Load "bbc-news", a .csv .tsv .json .jsonl .parquet .txt file, a folder of such split files, or a
        hub id.

        Columns and kind that are not given are told from known column names and from the type of the label.
        Without a validation split, a share (or whole number) of train is cut off, the same for the same seed,
        every label in proportion, equal texts on one side. A .txt file alone holds out that share of its end,
        half each for validation and test. `limit` keeps the first n rows after a shuffle by the seed, of
        train or of the splits it names; of running text it keeps the first n paragraphs.

        Raises:
            DataError: the source, a column, the labels or an option is of no use; the message says which and
                why.
        """
        raw, kind = _raw(os.fspath(source), kind, seed)
        if raw.prose:
            task = _prose(raw, kind, text, label, validation, limit)
        else:
            given = (text,) if isinstance(text, str) else text
            task = _rows(raw, kind, given, label, (seed, validation, limit))
        chosen = metric or default_metric(task.kind)
        check_metric(chosen, task.kind, task.labels)
        return cls(**{**vars(task), "name": name or raw.name, "metric": chosen})

    @property
    def num_labels(self) -> int:
        """Width of the head: the number of labels, 1 for regression, 0 where the task does not tell."""
        return self.task_kind.width(self.labels) or 0

    @property
    def task_kind(self) -> TaskKind:
        """What is known of the task's kind."""
        return kind_named(self.kind)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Label names in id order; the same as `labels`."""
        return self.labels

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the rows of all splits and of what is learned from them; the name does not
        count."""
        digest = hashlib.sha256(json.dumps([self.kind, self.text, self.label, self.labels, self.metric]).encode())
        for split in sorted(self.splits):
            digest.update(f"\n{split}\n".encode())
            for row in self.splits[split]:
                digest.update(self.task_kind.digest(row))
        return digest.hexdigest()

    def to_json(self) -> dict[str, object]:
        """Everything but the rows, as plain data, with the number of rows of each split and the
        fingerprint."""
        plain = {key: getattr(self, key) for key in ("name", "kind", "label", "metric")}
        lists = {"text": list(self.text), "labels": list(self.labels), "notes": dict(self.notes)}
        rows = {split: len(data) for split, data in self.splits.items()}
        return {**plain, **lists, "rows": rows, "fingerprint": self.fingerprint, **self.mixed_from()}

    def mixed_from(self) -> dict[str, object]:
        """`sources` as plain data under that name; nothing for a task that is no mixture."""
        return {"sources": [asdict(source) for source in self.sources]} if self.sources else {}

    def split(self, name: str) -> Dataset:
        """The rows of a split. Raises DataError, saying which there are, if the task has not got it."""
        if name in self.splits:
            return self.splits[name]
        why = self.notes.get(name) if name in SPLITS else None
        if why:
            raise DataError(f"the {name} split of {self.name} {why}; there are {', '.join(self.splits)}")
        raise DataError(
            f"{self.name} has no {name} split; there are {', '.join(self.splits)}{nearest(name, self.splits)}"
        )

    def encode(self, processor: Processor, split: str, *, max_length: int | None = None) -> Encoded:
        """The split as a model's inputs (token ids, or what the collator reads) and labels.

        Raises:
            DataError: there is no such split, the processor is of another kind, or `max_length` leaves no room.
        """
        return self.task_kind.encode(self.split(split), processor, self.text, self.label, max_length)

    def collator(self, processor: Processor, *, multiple: int = 1, model: nn.Module | None = None) -> Collate:
        """Makes a batch of encoded examples; texts are padded to the longest, or to a multiple of `multiple`.

        Padding is on the right, whatever side the tokenizer names, and on the left for a `model` that reads the last
        place of each row (XLNet).

        Raises:
            DataError: the processor is of another kind, the tokenizer has no token to pad with, or the model tells
                padding by another one.
        """
        return self.task_kind.collator(processor, multiple, model)


def _task(columns: Columns, labels: Sequence[str], splits: Mapping[str, Dataset], notes: Mapping[str, str]) -> Task:
    return Task("", columns.kind, columns.text, columns.label, tuple(labels), "", splits, notes)


def _raw(source: str, kind: str | None, seed: int) -> tuple[Raw, str | None]:
    """Splits as they were read, and the kind: of a source that has a form of a kind's own, else what is given."""
    wanted = None if kind is None else kind_named(kind)
    path = Path(source).expanduser()
    for each in reversed(TaskKind.registry.values()) if wanted is None else (wanted,):  # one's own come first
        own = each.read(path, seed) if path.exists() else None
        if own is not None:
            ordered = {split: own.splits[split] for split in SPLITS if split in own.splits}
            return replace(own, splits=ordered), each.name
    return read_splits(source, tagged=wanted is not None and wanted.reads_tagged), kind


def _rows(
    raw: Raw,
    kind: str | None,
    text: Sequence[str] | None,
    label: str | None,
    options: tuple[int, float, Limit],
) -> Task:
    """The task of raw splits of rows: columns inferred, labels numbered, a validation split cut off, limits kept."""
    seed, validation, limit = options
    main = next(iter(raw.splits.values()))
    columns = infer_columns(main, kind, text, label)
    labels, notes, splits = kind_named(columns.kind).label_set(main, columns), dict(raw.notes), {}
    if columns.note:
        notes[f"column {columns.label!r}"] = columns.note
    for split, rows in raw.splits.items():
        if rows is not main and is_unlabelled(rows, columns, labels):
            notes[split] = "has no labels"
        else:
            splits[split] = _prepared(rows, split, columns, labels)
    if "train" in splits and "validation" not in splits and validation:
        splits = cut_validation(splits, columns, validation, seed)
    return _task(columns, labels.names, limited(splits, limit, seed), notes)


def _prepared(rows: Dataset, split: str, columns: Columns, labels: Labels) -> Dataset:
    """Input columns as the kind keeps them, the label column as ids."""
    kind = kind_named(columns.kind)
    kept = kind.inputs(rows, split, columns)
    if columns.label is None:
        return kept
    ids = kind.label_ids(rows, split, columns, labels)
    with quiet():
        return kept.add_column(columns.label, ids, feature=kind.label_feature())


def limited(splits: Mapping[str, Dataset], limit: Limit, seed: int) -> dict[str, Dataset]:
    """Splits with at most so many rows, the first after a shuffle by the seed. Raises DataError for no such split."""
    found = dict(splits)
    for split, most in _limits(limit, splits).items():
        found[split] = found[split].select(first(len(found[split]), most, seed))
    return found


def _limits(limit: Limit, splits: Mapping[str, Dataset]) -> dict[str, int]:
    limits = dict(limit) if isinstance(limit, Mapping) else {} if limit is None else {"train": limit}
    for split in limits:
        if split not in splits:
            raise DataError(f"limit names the split {split!r}; there are {', '.join(splits)}{nearest(split, splits)}")
    return limits


def _prose(raw: Raw, kind: str | None, text: object, label: str | None, validation: float, limit: Limit) -> Task:
    """Running text: contiguous splits, each one record."""
    fitting = [name for name, each in TaskKind.registry.items() if each.reads_prose]
    if kind not in (None, *fitting) or text not in (None, "text", ("text",), ["text"]) or label:
        names = " or ".join(map(repr, fitting))
        raise DataError(f"{raw.name} is running text: its kind is {names}, its column 'text', and it has no label; "
                        "name a file with columns .csv or .tsv")  # fmt: skip
    splits = {split: rows["text"][:] for split, rows in raw.splits.items()}
    if validation and "train" in splits and "validation" not in splits:
        splits = _contiguous(splits, validation)
    rows = {split: Dataset.from_dict({"text": pieces}) for split, pieces in splits.items()}
    for split, most in _limits(limit, rows).items():
        splits[split] = [splits[split][i] for i in first(len(splits[split]), most, 0, shuffle=False)]
    joined = {split: Dataset.from_dict({"text": ["".join(pieces)]}) for split, pieces in splits.items()}
    return _task(Columns(kind or fitting[0], ("text",), None), (), joined, raw.notes)


def _contiguous(splits: Mapping[str, list[str]], validation: float) -> dict[str, list[str]]:
    """The end of train becomes validation, and half of that test if there is none."""
    pieces = splits["train"]
    held = round(share_of(validation, len(pieces)) * len(pieces))
    if held < 2 or held >= len(pieces):
        raise DataError(f"train has {len(pieces)} paragraphs, too few to cut splits; give a folder with a file for "
                        "each split (or validation=0 for train alone)")  # fmt: skip
    cut = len(pieces) - held
    middle = len(pieces) if "test" in splits else cut + (held + 1) // 2
    own = {"train": pieces[:cut], "validation": pieces[cut:middle]}
    return {**own, "test": splits.get("test", pieces[middle:])}
