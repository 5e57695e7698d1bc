"""largest_batch: how many examples of a batch fit into a given memory at once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from smidgen.common.errors import TrainError
from smidgen.recipe.recipe import Recipe, Term
from smidgen.training.memory.estimate import plan


@dataclass(frozen=True)
class StepShape:
    """A training step but for the size of its batch.

    Attributes:
        length: tokens of an example.
        recompute: with activations computed again, see `recomputing`.
    """

    length: int
    pooling: str | None = None
    recompute: bool = False


def largest_batch(
    model: nn.Module,
    recipe: str | Term | Recipe,
    max_memory_bytes: int,
    *,
    batch_size: int,
    length: int,
    pooling: str | None = None,
    recompute: bool = False,
) -> int:
    """The largest of batch_size, batch_size // 2, batch_size // 4, ..., 1 whose training step fits by estimate.

    Nothing is run but `plan`, on tensors without content; what fits is its `peak_bytes`.

    Args:
        max_memory_bytes: for weights, training state and activations together.
        batch_size, length: shape of the batch that is wanted, in examples and tokens.
        recompute: with activations computed again, see `recomputing`.

    Raises:
        TrainError: not even one example fits, or the model's memory cannot be estimated.
        PlanError: the recipe does not fit the model.
    """
    return batch_and_bytes(model, recipe, max_memory_bytes, batch_size, StepShape(length, pooling, recompute))[0]


def batch_and_bytes(
    model: nn.Module, recipe: str | Term | Recipe, max_memory_bytes: int, batch_size: int, shape: StepShape
) -> tuple[int, int]:
    """`largest_batch`, and the bytes that its step needs by estimate."""
    if batch_size < 1:
        raise TrainError(f"batch_size={batch_size} must be at least 1")
    size, need = 2 * batch_size, 0
    while size > 1:
        size //= 2
        need = _need(model, recipe, size, shape)
        if need <= max_memory_bytes:
            return size, need
    ways = ["a shorter max_length", "fewer layers (layers='top:2')", "a base in bfloat16"]
    ways = ways if shape.recompute else ["recompute=True", *ways]
    raise TrainError(
        f"one example of {shape.length} tokens needs {need:,} bytes to train {recipe} on {type(model).__name__}, "
        f"but only {max_memory_bytes:,} are allowed; what helps: {', '.join(ways)}"
    )


def _need(model: nn.Module, recipe: str | Term | Recipe, size: int, shape: StepShape) -> int:
    found = plan(model, recipe, pooling=shape.pooling, batch_size=size, length=shape.length, recompute=shape.recompute)
    costs = found.costs or {}
    if "unknown" in costs:
        why = costs["unknown"]
        raise TrainError(f"the memory of {type(model).__name__} cannot be estimated ({why}); set batch_size yourself")
    return int(costs["peak_bytes"])
