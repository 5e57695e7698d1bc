"""TaskRecord: what a delta's record says of the task that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smidgen.data.kinds.base import TaskKind, kind_named


@dataclass(frozen=True)
class TaskRecord:
    """What new inputs have to be like.

    Attributes:
        kind: name of the kind of task; None if the delta was trained on none.
        columns: the task's input columns.
        max_length: of an input, in tokens; None for the kind's own.
        max_new_tokens: of what the model writes; None if it was trained to write nothing.
    """

    kind: str | None
    columns: tuple[str, ...]
    max_length: int | None
    max_new_tokens: int | None = None

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> TaskRecord:
        """From a delta's `info`."""
        task, settings = info.get("task") or {}, info.get("settings") or {}
        texts = tuple(task.get("text") or ["text"])
        return cls(task.get("kind"), texts, settings.get("max_length"), settings.get("max_new_tokens"))

    @property
    def task_kind(self) -> TaskKind:
        """The kind of task; classification where none is recorded."""
        return kind_named(self.kind or "classification")

    @property
    def asked(self) -> int:
        """How many texts an input has."""
        return len(self.task_kind.asked(self.columns))
