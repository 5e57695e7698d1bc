"""What cannot be done with a loss that is coupled over its batch, or reads other batches."""

from __future__ import annotations

from smidgen.common.errors import TrainError
from smidgen.data.kinds.base import TaskKind
from smidgen.steps.objectives import BATCH, Objective, reduction_of
from smidgen.training.run.settings import PACK, Settings

READS_OTHERS = "the objective reads other batches than those that states are kept of"


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


def check_reading(objective: Objective, kind: TaskKind, settings: Settings, processes: int) -> None:
    """Raises TrainError if an objective's loss, coupled or of several batches, cannot be computed as it is meant."""
    name, others = type(objective).__name__, objective.needs(kind).batches
    coupled = reduction_of(objective, kind) == BATCH
    if not coupled and not others:
        return
    reads = "couples the examples of a batch" if coupled else f"reads {', '.join(others)} batches"
    if settings.batching == PACK and any(each.aligned for each in others.values()):
        raise TrainError(f"{name} {reads} row by row, which batching='pack' puts several of into one; leave it out")
    if processes > 1:
        raise TrainError(f"{name} {reads}, which {processes} processes would each see a part of; use one process")
    if others and settings.max_memory is not None:
        raise TrainError(f"{name} {reads}, which max_memory does not reckon with; leave it out")
