"""What cannot be done with a base in shards."""

from __future__ import annotations

from smidgen.common.errors import TrainError
from smidgen.data.metrics import METRICS
from smidgen.data.task import Task
from smidgen.steps.objectives import Objective
from smidgen.steps.step import BASE

COMPUTE_TOGETHER = "the base is in shards, so that all processes have to run the same passes"


def check_sharded(objective: Objective, task: Task) -> None:
    """Raises TrainError for what needs a base of its own in every process."""
    others = [name for name, what in objective.needs(task.task_kind).references.items() if what != BASE]
    if others:
        raise TrainError(
            f"{type(objective).__name__} keeps {others[0]!r}, another model beside the one that is trained, and a base "
            "in shards (FSDP2) is there once; leave --use_fsdp out"
        )
    if METRICS[task.metric] in task.task_kind.written:
        raise TrainError(
            f"{task.metric} reads what the model writes, text by text, and a base in shards (FSDP2) is computed by all "
            "processes together; choose another metric, or leave --use_fsdp out"
        )
