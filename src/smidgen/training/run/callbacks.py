"""Callback: what is told of a run while it trains. The progress bar, metrics.jsonl and growth are such."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from smidgen.common.errors import TrainError
from smidgen.data.task import Task
from smidgen.delta.delta import Delta
from smidgen.inference.evaluation import Scores
from smidgen.recipe.recipe import Recipe
from smidgen.steps.growth import after_step
from smidgen.training.run.progress import Progress
from smidgen.training.run.settings import Settings


@dataclass
class RunStatus:
    """What a callback sees. Whatever it changes in the model or the optimiser is changed.

    Attributes:
        model: with the recipe attached.
        optimizer: of the trained tensors.
        total: optimiser steps of the whole run.
        progress: steps and epochs done, and validations.
        loss: of the last step, its penalties included; NaN before the first.
        lr: the first parameter group's rate in that step.
        examples: of that step, over all processes.
        replaced: set by a callback that put other tensors in place of trained ones, so that those are trained.
    """

    model: nn.Module
    recipe: Recipe
    task: Task
    settings: Settings
    optimizer: torch.optim.Optimizer
    total: int
    progress: Progress
    loss: float = float("nan")
    lr: float = 0.0
    examples: int = 0
    replaced: bool = False

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.progress.step


class Callback:
    """Told of a run as it goes: `fit(..., callbacks=[...])`. What is not overridden does nothing.

    An error that a callback raises ends the run: its state is saved first, if it has a folder, and the same call goes
    on from there. Under several processes each has its own.
    """

    def on_step(self, run: RunStatus) -> None:
        """After each optimiser step."""

    def on_validation(self, run: RunStatus, scores: Scores) -> None:
        """After each pass over the validation split, the epoch being counted."""

    def on_epoch(self, run: RunStatus) -> None:
        """After each epoch, validated if there is a split for it."""

    def on_round(self, run: RunStatus, delta: Delta) -> None:
        """At the end of the whole run, which may be one round of several (`fit(start=delta)`); it is saved."""


class Growth(Callback):
    """Methods with events at steps go on with other tensors."""

    def on_step(self, run: RunStatus) -> None:
        """Let them."""
        run.replaced |= after_step(run.model, run.optimizer, run.step, run.total, run.settings.seed)


class MetricsLog(Callback):
    """Lines of metrics.jsonl: every tenth step, and each validation.

    Args:
        write: takes a line as plain data.
        speed: gives training examples a second.
    """

    def __init__(self, write: Callable[[Mapping[str, object]], None], speed: Callable[[], float]) -> None:
        self.write, self.speed = write, speed

    def on_step(self, run: RunStatus) -> None:
        """A line for every tenth step, and for the last."""
        if run.step % 10 == 0 or run.step == run.total:
            self.write({"step": run.step, "loss": run.loss, "lr": run.lr, "rate": round(self.speed(), 1)})

    def on_validation(self, run: RunStatus, scores: Scores) -> None:
        """A line for each."""
        self.write(run.progress.history[-1].to_json())


class Callbacks:
    """The run's own, and those that were given, which may fail.

    Args:
        own: told first; what they raise passes as it is.
        given: told after them, in order.
        save: called before a failure of a given one is reported; says what became of the run.
    """

    def __init__(self, own: Sequence[Callback], given: Sequence[Callback], save: Callable[[], str]) -> None:
        self.own, self.given, self.save = own, given, save

    def tell(self, event: str, run: RunStatus, *about: object) -> None:
        """Call `on_<event>` of all.

        Raises:
            TrainError: a given one raised; the run has been saved.
        """
        for callback in self.own:
            getattr(callback, f"on_{event}")(run, *about)
        for callback in self.given:
            try:
                getattr(callback, f"on_{event}")(run, *about)
            except Exception as error:
                said = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise TrainError(
                    f"{type(callback).__name__}.on_{event} failed after step {run.step} ({said}); {self.save()}"
                ) from error


def check_callbacks(given: Sequence[Callback]) -> None:
    """Raises TrainError, before anything is trained, if something is no callback."""
    for each in given:
        if not isinstance(each, Callback):
            made = f"; pass {each.__name__}()" if isinstance(each, type) else ""
            raise TrainError(f"callbacks= holds {each!r:.60}, which is no smidgen.Callback{made}")
