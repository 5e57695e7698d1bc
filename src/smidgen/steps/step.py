"""Step: what a loss is computed from, as an objective sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from smidgen.common.errors import TrainError
from smidgen.data.kinds.base import Outputs, TaskKind
from smidgen.data.task import Task
from smidgen.delta.delta import Delta

Batch = Mapping[str, Tensor]
Reference = Literal["base", "start"] | Delta | nn.Module
BASE: Literal["base"] = "base"
START: Literal["start"] = "start"
TRAIN = "train"


@dataclass(frozen=True)
class Batches:
    """Batches of other data than what is trained on, one for each step, in an order of the run's seed or aligned.

    Attributes:
        task: where the rows are; None for the run's own task.
        split: of the task.
        batch_size: rows of a batch; None for that of the run.
        labelled: whether the batch has its labels; without, a model gives no loss for it.
        aligned: row i belongs to row i of the train split, so that a batch holds the partners of what is trained on.
    """

    task: Task | None = None
    split: str = "train"
    batch_size: int | None = None
    labelled: bool = True
    aligned: bool = False


@dataclass(frozen=True, eq=False)
class Step:
    """One step, as an objective sees it.

    Attributes:
        model: with the recipe attached; its tensors, for penalties. Outputs are `outputs()`.
        kind: of the task.
        batches: name -> tensors (B, ...): "train", and those that the objective needs.
        run: (name of a reference or None for the tuned model, name of a batch) -> what the model gives.
        number: of the optimiser step, from 0; the same again for each part of a batch that is cut.
        total: how many steps there will be; 0 where that is not known.
    """

    model: nn.Module
    kind: TaskKind
    batches: Mapping[str, Batch]
    run: Callable[[str | None, str], Outputs]
    number: int = 0
    total: int = 0
    _seen: dict[tuple[str | None, str], Outputs] = field(default_factory=dict, repr=False)

    @property
    def batch(self) -> Batch:
        """The batch that is trained on."""
        return self.batches[TRAIN]

    def outputs(self, batch: str = TRAIN) -> Outputs:
        """What the tuned model gives for a batch, with gradient: `logits`, and `loss` if it has labels. Run once."""
        return self._of(None, batch)

    def reference(self, name: str = BASE, batch: str = TRAIN) -> Outputs:
        """What a reference gives for a batch, without gradient and in eval mode. Run once."""
        return self._of(name, batch)

    def _of(self, name: str | None, batch: str) -> Outputs:
        """Raises TrainError if there is no such batch."""
        if batch not in self.batches:
            raise TrainError(f"the objective reads a batch {batch!r}, but needs() names {', '.join(self.batches)}")
        if (name, batch) not in self._seen:
            self._seen[name, batch] = self.run(name, batch)
        return self._seen[name, batch]
