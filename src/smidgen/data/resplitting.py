"""Other splits of a task: a test split where there is none, and fewer examples to learn from."""

from __future__ import annotations

from dataclasses import replace

from smidgen.common.errors import DataError
from smidgen.data.columns import Columns
from smidgen.data.splits import first
from smidgen.data.task import Task
from smidgen.data.validation_cut import cut_validation


def with_test(task: Task, *, validation: float = 0.1, seed: int = 0) -> Task:
    """The task with train, validation and test.

    Without a test split, the validation split becomes it: GLUE keeps the labels of its test splits to itself, so that
    studies report its validation splits, which must not choose epochs or rates then. What is not there otherwise is cut
    off train: first the test split, with a seed of its own, then the validation split.

    Raises:
        DataError: there is no train to cut from, or too little.
    """
    splits, notes = dict(task.splits), dict(task.notes)
    columns = Columns(task.kind, task.text, task.label)
    if "test" not in splits and "validation" not in splits:
        task.split("train")
        cut = cut_validation(splits, columns, validation, seed + 1)
        splits |= {"train": cut["train"], "test": cut["validation"]}
        notes["test"] = "is cut off train"
    elif "test" not in splits:
        splits["test"] = task.split("validation")
        del splits["validation"]
        notes["test"] = "is the source's validation split"
    if "validation" not in splits:
        task.split("train")
        splits = cut_validation(splits, columns, validation, seed)
        notes["validation"] = "is cut off train"
    return replace(task, splits=splits, notes=notes)


def with_examples(task: Task, examples: int, seed: int = 0) -> Task:
    """The task with so many training examples, drawn by the seed; the other splits are whole.

    Raises:
        DataError: train has fewer.
    """
    train = task.split("train")
    if examples > len(train):
        raise DataError(f"examples={examples} are more than the {len(train):,} that {task.name} has to train on")
    return replace(task, splits={**task.splits, "train": train.select(first(len(train), examples, seed))})
