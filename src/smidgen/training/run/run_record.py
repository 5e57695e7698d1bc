"""What a run says of itself: what was asked for, what was chosen, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from smidgen.data.encoded import Encoded
from smidgen.data.task import Task
from smidgen.delta.fingerprint import SHA256, XXH3, Fingerprint
from smidgen.delta.saved_selection import Selection
from smidgen.methods.base import renewed
from smidgen.recipe.recipe import Recipe
from smidgen.sites.task_head import head_names
from smidgen.steps.objectives import Objective
from smidgen.steps.optimizer_groups import optimizer
from smidgen.training.run.settings import Settings


def asked(
    model: nn.Module,
    recipe: Recipe,
    task: Task,
    settings: Settings,
    objective: Objective,
    selection: Selection | None,
    algorithm: str = XXH3,
) -> dict[str, Any]:
    """What has to be the same when a run is resumed; `algorithm`: by which its record tells the base's content."""
    base = Fingerprint.of(model, (*head_names(model), *renewed(recipe, model)), algorithm=algorithm)
    return {
        "model": base.name,
        "base": base.content + base.buffers,
        **({} if algorithm == SHA256 else {"base_hash": algorithm}),  # records from before name none
        "dtype": base.dtype,
        "recipe": recipe.to_json(),
        "task": task.name,
        "data": task.fingerprint,
        "objective": repr(objective),
        "selection": selection and selection.digest,
        "settings": asdict(settings),
    }


def selection_record(model: nn.Module, settings: Settings, rows: Encoded, steps: int, processes: int) -> dict[str, Any]:
    """What was left open and is now decided, for a model with a recipe attached."""
    groups = optimizer(model, settings.lr, settings.head_lr).param_groups
    return {
        "max_length": rows.max_length,
        "truncated": rows.truncated,
        "steps": steps,
        "lr": {group["name"]: group["lr"] for group in groups},
        "checkpoint_steps": settings.checkpoint_steps or max(10, steps // 20),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def outcome(
    task: Task, settings: Settings, max_length: int | None, numbers: Mapping[str, Any], selection: Selection | None
) -> dict[str, Any]:
    """What a delta records of the run that it comes from."""
    best = next(entry for entry in numbers["history"] if entry["epoch"] == numbers["best_epoch"])
    about = {"name": task.name, "kind": task.kind, "metric": task.metric, "text": list(task.text)}
    return {
        "task": about,
        "settings": {**asdict(settings), "max_length": max_length},
        "scores": {f"validation {name}": value for name, value in best["validation"].items()},
        "best_epoch": numbers["best_epoch"],
        "best_step": best["step"],
        **({"selection": selection.info} if selection else {}),
    }
