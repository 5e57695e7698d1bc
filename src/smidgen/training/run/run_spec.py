"""RunSpec: all that is asked of one run of `fit`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from torch import nn

from smidgen.common.errors import DataError, TrainError
from smidgen.common.wrappers import bare, check_model
from smidgen.data.processor import Processor
from smidgen.data.task import Task
from smidgen.delta.delta import Delta
from smidgen.delta.saved_selection import Selection
from smidgen.efficiency.prefix_cache.shared_caches import Kept
from smidgen.methods.capabilities import Grows
from smidgen.recipe.recipe import Recipe
from smidgen.steps.objectives import Objective, reduction_of
from smidgen.training.run.callbacks import Callback, check_callbacks
from smidgen.training.run.settings import Settings


@dataclass(frozen=True, eq=False)
class RunSpec:
    """What `fit` was asked for, checked as far as that needs no data.

    Attributes:
        model: the bare model.
        out: the run's folder, or None.
        processor: None for the one of the model's name.
        progress: see `Bar`.
        start: a delta to go on from.
        callbacks: told of the run.
        shared: states below the lowest edit that earlier runs kept.
    """

    model: nn.Module
    recipe: Recipe
    task: Task
    settings: Settings
    objective: Objective
    out: str | os.PathLike[str] | None = None
    processor: Processor | None = None
    progress: bool | None = None
    selection: Selection | None = None
    start: Delta | None = None
    callbacks: tuple[Callback, ...] = ()
    shared: Kept | None = None

    def checked(self) -> RunSpec:
        """The same with the bare model, and the start's own recipe and pooling.

        Raises:
            AttachError: nothing can be attached to the model.
            TrainError, DataError, SmidgenError: something does not fit together; says what.
        """
        check_model(self.model)
        check_callbacks(self.callbacks)
        if not isinstance(self.objective, Objective):
            raise TrainError(f"objective={self.objective!r:.60} is no smidgen.Objective; TaskLoss() is the default")
        self.objective.needs(self.task.task_kind)
        reduction_of(self.objective, self.task.task_kind)
        return self._started() if self.start is not None else replace(self, model=bare(self.model))

    def _started(self) -> RunSpec:
        """The run as it goes on from `start`."""
        start, s = self.start, self.settings
        assert start is not None
        if self.recipe not in (start.recipe, start.recipe.whole):
            raise TrainError(f"start was trained with {start.recipe}, so recipe={self.recipe} cannot go on from it")
        if self.selection is not None:
            raise TrainError("start= brings its own selection; leave selection= out")
        if s.pooling not in (None, start.pooling):
            raise TrainError(f"start was trained with pooling={start.pooling!r}; leave pooling={s.pooling!r} out")
        grows = next((m for m in start.recipe if isinstance(m, Grows)), None)
        if grows is not None:
            raise TrainError(f"{grows} grows by a schedule that a delta does not hold, so nothing goes on from it")
        unnamed = all(name == f"LABEL_{i}" for i, name in enumerate(start.labels))
        if start.head and not unnamed and start.labels != tuple(self.task.labels):
            raise DataError(
                f"the data has the labels {', '.join(self.task.labels) or 'none'}; "
                f"start was trained on {', '.join(start.labels)}"
            )
        settings = replace(s, pooling=start.pooling)
        return replace(self, model=bare(self.model), recipe=start.recipe, settings=settings)
