"""One task of several: their training examples in given proportions, their held-out examples together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from datasets import Dataset, concatenate_datasets

from smidgen.common.errors import DataError
from smidgen.data.columns import Columns
from smidgen.data.readers import SPLITS, quiet
from smidgen.data.splits import first
from smidgen.data.task import Limit, MixedSource, Task, limited

_SHARED = ("kind", "text", "label", "labels", "metric")


def mix_tasks(
    tasks: Sequence[Task],
    weights: Sequence[float] | None = None,
    *,
    seed: int = 0,
    limit: Limit = None,
    name: str | None = None,
) -> Task:
    """One task of several of the same kind, columns and labels.

    Without weights all training examples are taken. With weights they stand in these proportions, as many as there can
    be without one that comes twice, drawn by the seed. The validation split is all of the tasks' own validation splits,
    whatever the weights are, and so is the test split. A training example whose text is held out by another of the
    tasks is left out, and counted in `notes`. `sources` of the task says what came from where.

    Args:
        limit: as of `Task.load`, of the mixture.

    Raises:
        DataError: the tasks differ, there are more or fewer weights than tasks, or a weight is not above 0.
    """
    if len(tasks) < 2:
        raise DataError(f"a mixture is of two tasks or more, found {len(tasks)}")
    _check_alike(tasks)
    notes = {f"{task.name}'s {what}": why for task in tasks for what, why in task.notes.items()}
    splits, rows = dict[str, Dataset](), [dict[str, int]() for _ in tasks]
    for split in (split for split in SPLITS if split != "train"):
        parts = [task.splits.get(split) for task in tasks]
        _join(split, parts, splits, rows)
    train = [_apart(task, tasks, notes) for task in tasks]
    if weights is not None:
        train = _weighted(train, weights, seed)
    _join("train", train, splits, rows)
    ordered = {split: splits[split] for split in SPLITS if split in splits}
    shares = [None] * len(tasks) if weights is None else [float(weight) for weight in weights]
    sources = tuple(MixedSource(t.name, w, kept) for t, w, kept in zip(tasks, shares, rows, strict=True))
    title = name or " + ".join(task.name for task in tasks)
    return replace(tasks[0], name=title, splits=limited(ordered, limit, seed), notes=notes, sources=sources)


def _check_alike(tasks: Sequence[Task]) -> None:
    """Raises DataError if tasks are not of one kind, with the same columns, labels and metric."""
    for other in tasks[1:]:
        for what in _SHARED:
            mine, theirs = getattr(tasks[0], what), getattr(other, what)
            if mine != theirs:
                hint = "; give kind=, such as 'chat' for conversations of any form" if what in ("kind", "text") else ""
                raise DataError(f"tasks of one mixture have one {what}: {tasks[0].name} has {mine!r}, {other.name} "
                                f"{theirs!r}{hint}")  # fmt: skip


def _join(
    split: str, parts: Sequence[Dataset | None], splits: dict[str, Dataset], rows: Sequence[dict[str, int]]
) -> None:
    """The parts of a split that there are, as one; `rows` counts them."""
    there = [part for part in parts if part is not None and len(part)]
    if not there:
        return
    for part, count in zip(parts, rows, strict=True):
        count[split] = 0 if part is None else len(part)
    columns = there[0].column_names
    if all(part.features == there[0].features for part in there):
        with quiet():
            splits[split] = concatenate_datasets(there)
        return
    # structs with other fields: made anew, a field that a row has not got is None
    splits[split] = Dataset.from_dict({name: [cell for part in there for cell in part[name][:]] for name in columns})


def _apart(task: Task, tasks: Sequence[Task], notes: dict[str, str]) -> Dataset | None:
    """Training rows whose text none of the other tasks holds out."""
    train = task.splits.get("train")
    if train is None:
        return None
    held = {
        key
        for other in tasks
        if other is not task
        for split, rows in other.splits.items()
        if split != "train"
        for key in _keys(other, rows)
    }
    kept = [row for row, key in enumerate(_keys(task, train)) if key not in held]
    if len(kept) < len(train):
        gone = len(train) - len(kept)
        notes[f"{task.name}'s train"] = f"lacks {gone} examples that another source holds out"
    return train.select(kept)


def _keys(task: Task, rows: Dataset) -> list[str]:
    columns = Columns(task.kind, task.text, task.label)
    return [" ".join("\n".join(texts).casefold().split()) for texts in task.task_kind.keys(rows, columns)]


def _weighted(train: Sequence[Dataset | None], weights: Sequence[float], seed: int) -> list[Dataset | None]:
    """As many rows of each as the proportions allow without one that comes twice."""
    if len(weights) != len(train):
        raise DataError(f"{len(weights)} weights for {len(train)} sources; give one for each, in their order")
    if not all(0 < weight < float("inf") for weight in weights):
        raise DataError(f"weights={list(weights)} must be numbers above 0")
    sizes = [0 if rows is None else len(rows) for rows in train]
    if not all(sizes):
        raise DataError(f"source {sizes.index(0)} has no train split to take a proportion of")
    whole = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    counts = [max(1, int(whole * weight + 1e-9)) for weight in weights]
    drawn = zip(train, sizes, counts, strict=True)
    return [rows and rows.select(sorted(first(size, count, seed))) for rows, size, count in drawn]
