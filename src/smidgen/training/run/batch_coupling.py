"""What cannot be done with a loss that is coupled over its batch."""

from __future__ import annotations

from smidgen.common.errors import TrainError
from smidgen.data.kinds.base import TaskKind
from smidgen.training.run.settings import Settings


def check_coupling(kind: TaskKind, settings: Settings, processes: int) -> None:
    """Raises TrainError if batches of a task whose loss is coupled over the batch would be cut, or hold one row."""
    if not kind.couples_batch:
        return
    why = f"the loss of a {kind.name} task is coupled over its batch"
    if settings.max_memory is not None:
        raise TrainError(f"max_memory={settings.max_memory} cuts batches, and {why}; set a smaller batch_size instead")
    if processes > 1:
        raise TrainError(f"{processes} processes part each batch, and {why}; use one process")
    if settings.batch_size < 2 and settings.batch_tokens is None:
        raise TrainError(f"batch_size={settings.batch_size}, and {why}; it must be at least 2")
