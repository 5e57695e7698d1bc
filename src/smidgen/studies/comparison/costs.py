"""What a run took: values, bytes, time, memory, work."""

from __future__ import annotations

from smidgen.common.atomic_files import read_json
from smidgen.delta.delta import Delta
from smidgen.studies.comparison.cell import StudyCell
from smidgen.studies.comparison.study import StudyArm
from smidgen.studies.comparison.study_work import METER
from smidgen.studies.run_folders import FIT
from smidgen.studies.trial import Trial
from smidgen.training.memory.estimate import plan

FILES = ("delta.safetensors", "delta.json")


def run_costs(cell: StudyCell, arm: StudyArm, key: str, trial: Trial, delta: Delta) -> dict[str, float | None]:
    """Name -> number, of a run that came to its end; None where it is not measured.

    trained_values, head_values, file_bytes, steps, examples_per_second; what `EfficiencyMeter` measures; and what
    `plan` counts exactly for a batch of the study's size: step_bytes, flops_per_token (or per example).
    """
    folder = cell.store.folder(key)
    measured = read_json(folder / METER) if (folder / METER).is_file() else {"seconds": trial.seconds}
    learned = len(cell.tasks[trial.seed].split("train"))
    head = sum(delta.tensors[name].numel() for name in delta.head)
    return {
        **measured,
        "trained_values": float(delta.trained),
        "head_values": float(head),
        "file_bytes": float(sum((folder / FIT / name).stat().st_size for name in FILES)),
        "steps": float(str(delta.info["steps"])),
        "train_examples": float(learned),
        "examples_per_second": learned * cell.settings.epochs / measured["seconds"],
        **_estimates(cell, arm),
    }


def _estimates(cell: StudyCell, arm: StudyArm) -> dict[str, float | None]:
    """Counted by `plan` for a batch of the study's size: exact, and the same on every machine."""
    size, length = cell.settings.batch_size, cell.settings.max_length
    found = plan(cell.loaded[0], arm.parsed, pooling=arm.pooling, batch_size=size, length=length).costs or {}
    flops = [value for name, value in found.items() if name.startswith("training_flops_per_")]
    step = found.get("peak_bytes")
    return {
        "step_bytes": None if step is None else float(step),
        "flops_per_token": float(flops[0]) if flops else None,
    }
