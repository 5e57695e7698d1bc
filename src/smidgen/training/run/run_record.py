"""What a run says of itself: what was asked for, what was chosen, and what came of it."""

from __future__ import annotations

import math
from dataclasses import asdict

import torch
from torch import nn

from smidgen.data.encoded import Encoded, tokens_of
from smidgen.data.labels import IGNORED
from smidgen.delta.fingerprint import SHA256, XXH3, Fingerprint
from smidgen.delta.saved_selection import Selection
from smidgen.methods.base import renewed
from smidgen.sites.task_head import head_names
from smidgen.steps.optimizer_groups import optimizer
from smidgen.training.run.progress import Choices, Progress
from smidgen.training.run.run_spec import RunSpec


def asked(run: RunSpec, algorithm: str = XXH3) -> dict[str, object]:
    """What has to be the same when a run is resumed, plain data; `algorithm`: by which its record tells the base.

    Raises:
        TrainError: the objective cannot be told apart in another process.
    """
    model, recipe, selection, start = run.model, run.recipe, run.selection, run.start
    base = Fingerprint.of(model, (*head_names(model), *renewed(recipe, model)), algorithm=algorithm)
    return {
        "model": base.name,
        "base": base.values,
        "dtype": base.dtype,
        "recipe": recipe.to_json(),
        "task": run.task.name,
        "data": run.task.fingerprint,
        **run.task.mixed_from(),
        "objective": run.objective.identity,
        "selection": selection and selection.digest,
        "start": start and start.digest,
        "settings": asdict(run.settings),
        **({} if algorithm == SHA256 else {"base_hash": algorithm}),  # records from before name none
    }


def choices(model: nn.Module, run: RunSpec, rows: Encoded, steps: int, processes: int) -> Choices:
    """What was left open and is now decided, for a model with a recipe attached."""
    settings = run.settings
    groups = optimizer(model, settings.lr, settings.head_lr).param_groups
    return Choices(
        max_length=rows.max_length,
        truncated=rows.truncated,
        steps=steps,
        lr={group["name"]: group["lr"] for group in groups},
        checkpoint_steps=settings.checkpoint_steps or max(10, steps // 20),
        processes=processes,
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        max_new_tokens=new_tokens(rows, settings.max_new_tokens) if run.task.task_kind.written else None,
    )


def outcome(
    run: RunSpec, chosen: Choices, progress: Progress, total: int, selection: Selection | None
) -> dict[str, object]:
    """What a delta records of the run that it comes from, plain data. Without a validation the last epoch counts."""
    task, start = run.task, run.start
    best = next((entry for entry in progress.history if entry.epoch == progress.best_epoch), None)
    about = {"name": task.name, "kind": task.kind, "metric": task.metric, "text": list(task.text), **task.mixed_from()}
    settings = asdict(run.settings)
    return {
        "task": about,
        "settings": {**settings, "max_length": chosen.max_length, "max_new_tokens": chosen.max_new_tokens},
        "scores": {f"validation {name}": value for name, value in best.scores.items()} if best else {},
        "best_epoch": best.epoch if best else progress.epochs,
        "best_step": best.step if best else progress.step,
        **({"selection": dict(selection.info)} if selection else {}),
        **({"start": start.digest} if start else {}),
        "steps": total,
    }


def new_tokens(rows: Encoded, given: int | None) -> int:
    """How many tokens a model may write: what is given, else those of the longest right text and a quarter more."""
    longest = max(sum(label != IGNORED for label in tokens_of(row, "labels")) for row in rows)
    return given or math.ceil(1.25 * longest)
