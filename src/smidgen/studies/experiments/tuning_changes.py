"""Changes by experiment: fine-tune one base on several tasks with several seeds, and measure each run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Unpack

import torch
from torch import nn

from smidgen.common.errors import ModelError
from smidgen.common.wrappers import bare
from smidgen.data.task import Task
from smidgen.delta.delta import Delta
from smidgen.delta.fingerprint import Fingerprint
from smidgen.delta.merging import RoundingWarning, merge
from smidgen.inference.loading import load
from smidgen.recipe.recipe import Recipe, Term, as_recipe
from smidgen.studies.experiments.parameter_changes import Changes, Run, RunInfo, compare_changes, join_changes
from smidgen.studies.run_folders import RunFolders, key_of
from smidgen.training.fitting import fit
from smidgen.training.run.settings import Settings, SettingsOptions, UnseededOptions

Recipes = str | Term | Recipe
RESULT = "result.json"


def analyze_changes(
    model_name: str | os.PathLike[str],
    tasks: Sequence[Task],
    recipe: Recipes = "Full()",
    seeds: int | Sequence[int] = 3,
    *,
    out: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] | None = None,
    **settings: Unpack[UnseededOptions],
) -> Changes:
    """Fine-tune on every task with every seed through `fit`, and say how far each component moved.

    What is measured is the state that `fit` gives back: that of the best epoch on validation.

    Args:
        seeds: how many (0, 1, ...), or which.
        out: folder that keeps each finished run's numbers (kilobytes); the same call goes on there.
        say: gets a line per finished run.
        settings: fields of `Settings`, as in `fit`, but the seed.

    Raises:
        ModelError: no tasks or seeds, or two tasks of one name.
    """
    chosen = range(seeds) if isinstance(seeds, int) else seeds
    names = [task.name for task in tasks]
    if not names or not list(chosen):
        raise ModelError(f"there is nothing to train on: {len(names)} tasks, {len(list(chosen))} seeds")
    if len(set(names)) < len(names):
        raise ModelError(f"two tasks have one name ({', '.join(names)}); give each its own with Task.load(..., name=)")
    found, kept = [], None if out is None else RunFolders(out)
    for task in tasks:
        for seed in chosen:
            one = _run(model_name, task, as_recipe(recipe), {**settings, "seed": seed}, kept)
            found.append(one)
            if say is not None:
                say(f"{_said(one.runs[0])} ({len(found)} of {len(tasks) * len(list(chosen))})")
    return join_changes(found)


def change_of(model: nn.Module, delta: Delta) -> Changes:
    """How far a delta takes its base; what it adds (LoRA) is folded into the weights first.

    Raises:
        DeltaError: the delta belongs to another base.
        AttachError: a method that cannot be folded.
    """
    model = bare(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundingWarning)  # nothing rounds: float32
        tuned = merge(model, replace(delta, pooling=None), dtype=torch.float32)  # no pooling: only weights are read
    said = delta.info
    info: RunInfo = {"scores": said.get("scores"), "best_epoch": said.get("best_epoch"), "steps": said.get("steps")}
    found = Run(delta.info.get("task", {}).get("name", ""), delta.info.get("settings", {}).get("seed", 0), info)
    rates = lr_steps(delta)
    found = replace(found, info={**info, "lr_steps": rates})
    return replace(compare_changes(model, tuned, lr_steps=rates, run=found), recipe=str(delta.recipe))


def lr_steps(delta: Delta) -> float | None:
    """Sum of the learning rates of the steps up to the best epoch; None if unknown or if its methods' rates differ."""
    kept = delta.info.get("settings", {})
    known = {key: kept[key] for key in (f.name for f in fields(Settings)) if key in kept}
    rates = {known.get("lr") or getattr(term, "lr", None) for term in delta.recipe}
    steps, best = delta.info.get("steps"), delta.info.get("best_epoch")
    rate = rates.pop() if len(rates) == 1 else None
    if rate is None or not steps or not best:
        return None
    settings = Settings(**known)
    done = delta.info.get("best_step", steps * best // settings.epochs)  # older files: epochs were equally long
    return float(rate) * sum(settings.rate(step, steps) for step in range(done))


def _run(
    name: str | os.PathLike[str], task: Task, recipe: Recipe, settings: SettingsOptions, out: RunFolders | None
) -> Changes:
    """One run, or its numbers where they are kept already."""
    model, processor = load(name, task=task, seed=settings["seed"])
    said = {"base": Fingerprint.of(model, ()).values, "model": os.fspath(name), "recipe": recipe.to_json()}
    key = key_of({**said, "task": task.name, "data": task.fingerprint, "settings": dict(settings)})
    record = None if out is None else out.read(key, RESULT)
    if record is not None:
        return Changes.from_json(record["changes"])
    delta = fit(model, recipe, task, processor=processor, **settings)
    found = change_of(model, delta)
    if out is not None:
        out.write(key, {RESULT: {"changes": found.to_json()}})
    return found


def _said(run: Run) -> str:
    scores = ", ".join(f"{name} {value:.4f}" for name, value in (run.info.get("scores") or {}).items())
    return f"{run.task}, seed {run.seed}: {scores}"
