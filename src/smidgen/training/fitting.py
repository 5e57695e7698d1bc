"""fit: one loop on Accelerate. The base is untouched; the best state on validation comes back as a Delta."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Unpack

from torch import nn

from smidgen.data.processor import Processor, given_processor
from smidgen.data.task import Task
from smidgen.delta.delta import Delta
from smidgen.delta.saved_selection import Selection
from smidgen.recipe.recipe import Recipe, Term, as_recipe
from smidgen.steps.objectives import Objective, TaskLoss
from smidgen.training.run.callbacks import Callback
from smidgen.training.run.loop import Loop
from smidgen.training.run.run_spec import RunSpec
from smidgen.training.run.settings import Settings, SettingsOptions


def fit(  # noqa: PLR0913 - options by keyword
    model: nn.Module,
    recipe: str | Term | Recipe,
    task: Task,
    *,
    objective: Objective | None = None,
    out: str | os.PathLike[str] | None = None,
    processor: Processor | None = None,
    tokenizer: Processor | None = None,
    selection: Selection | None = None,
    start: Delta | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
    **settings: Unpack[SettingsOptions],
) -> Delta:
    """Train a recipe on a task and give it back as a Delta; the base comes back bit for bit.

    AdamW without decay on edits, linear warm-up and decay, clipping; best epoch on the validation split kept, or the
    last one, with a warning, where there is no such split. With `out`, the run can be killed at any moment and started
    again by the same call; after its end the same call gives the saved delta.

    Args:
        model: from `smidgen.load(name, task=task)`, or any transformers model of the right class.
        selection: what to keep, instead of what the recipe's Select would choose (see `smidgen.select`); the delta
            then records the selection's recipe.
        objective: the loss and what it needs; by default the model's own loss.
        start: a delta of this recipe to go on from, its head included; the optimiser begins anew.
        callbacks: told of steps, epochs, validations and the end.
        processor: makes the model's inputs, by default the one of its name; `tokenizer` is another name of it.
        settings: fields of `Settings`: seed, epochs, lr, head_lr, batch_size, max_length, pooling, ...

    Raises:
        TrainError: the loss or a gradient is not finite, a trained tensor is not reached or does not move, `out`
            holds another run, a batch does not fit into memory, a row not into `batch_tokens`, rows cannot be
            packed, `start` is of another recipe, or a callback failed.
        DataError: no train split, or labels that do not fit.
    """
    recipe = as_recipe(recipe)
    if selection is not None and recipe.whole == selection.recipe.whole:
        recipe = selection.recipe
    spec = RunSpec(
        model=model,
        recipe=recipe,
        task=task,
        settings=Settings.of(settings),
        objective=objective or TaskLoss(),
        out=out,
        processor=given_processor(processor, tokenizer),
        progress=progress,
        selection=selection,
        start=start,
        callbacks=tuple(callbacks),
    )
    return Loop(spec).fit()
