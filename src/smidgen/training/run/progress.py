"""How far a run is, what it found on the way, and what was chosen for it: plain data, as a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self, TypedDict

from torch import Tensor


class ValidationLine(TypedDict):
    """A validation as JSON has it."""

    epoch: int
    step: int
    validation: dict[str, float]


@dataclass(frozen=True)
class Validation:
    """Metrics on the validation split after an epoch.

    Attributes:
        epoch, step: how many were done.
        scores: metric name -> value.
    """

    epoch: int
    step: int
    scores: Mapping[str, float]

    def to_json(self) -> ValidationLine:
        """As metrics.jsonl and a checkpoint have it."""
        return {"epoch": self.epoch, "step": self.step, "validation": dict(self.scores)}

    @classmethod
    def from_json(cls, data: ValidationLine) -> Self:
        """The inverse."""
        return cls(int(data["epoch"]), int(data["step"]), dict(data["validation"]))


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimiser steps done.
        epochs: whole epochs done.
        best: the task's metric at the best validation, turned so that more is better; None before the first.
        best_epoch: after how many epochs that was.
        history: all validations, in order.
    """

    step: int = 0
    epochs: int = 0
    best: float | None = None
    best_epoch: int | None = None
    history: list[Validation] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return {**vars(self), "history": [entry.to_json() for entry in self.history]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse. Raises TypeError, KeyError or ValueError for anything else."""
        history = [Validation.from_json(entry) for entry in data.get("history", ())]
        return cls(**{**data, "history": history})


@dataclass
class State:
    """Everything that the next step depends on: tensors by name, and how far the run is."""

    tensors: dict[str, Tensor]
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True)
class Choices:
    """What a run's settings left open and is now decided; recorded, and used again on resuming.

    Attributes:
        max_length: tokens of an example; None where examples have none.
        max_new_tokens: of what the model writes; None where it writes nothing.
        truncated: examples that were longer.
        steps: optimiser steps in all.
        lr: name of a parameter group -> its rate.
        checkpoint_steps: steps between two checkpoints.
        processes, threads, torch: what the run was begun with.
        cache, rows: "on", or why not: states below the lowest edit are kept; the last block is computed for one token.
        rows_at_once: rows of a batch that are computed together.
    """

    max_length: int | None
    truncated: int
    steps: int
    lr: Mapping[str, float]
    checkpoint_steps: int
    processes: int
    threads: int
    torch: str
    cache: str | None = None
    rows: str | None = None
    rows_at_once: int | None = None
    max_new_tokens: int | None = None

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse; what other versions recorded beside it is left out."""
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})
