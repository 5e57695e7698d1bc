"""largest_batch: how many examples of a batch fit into a given memory at once."""

from __future__ import annotations

from typing import Any

from torch import nn

from smidgen.common.errors import TrainError
from smidgen.recipe.recipe import Recipe, Term
from smidgen.training.memory.estimate import plan


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
    shape: dict[str, Any] = {"length": length, "pooling": pooling, "recompute": recompute}
    return batch_and_bytes(model, recipe, max_memory_bytes, batch_size, **shape)[0]


def batch_and_bytes(
    model: nn.Module, recipe: str | Term | Recipe, max_memory_bytes: int, batch_size: int, passes: int = 1, **shape: Any
) -> tuple[int, int]:
    """`largest_batch`, and the bytes that its step needs by estimate. passes: rows of the model for each example."""
    if batch_size < 1:
        raise TrainError(f"batch_size={batch_size} must be at least 1")
    size, need = 2 * batch_size, 0
    while size > 1:
        size //= 2
        need = _need(model, recipe, passes * size, **shape)
        if need <= max_memory_bytes:
            return size, need
    ways = ["a shorter max_length", "fewer layers (layers='top:2')", "a base in bfloat16"]
    ways = ways if shape["recompute"] else ["recompute=True", *ways]
    raise TrainError(
        f"one example of {shape['length']} tokens needs {need:,} bytes to train {recipe} on {type(model).__name__}, "
        f"but only {max_memory_bytes:,} are allowed; what helps: {', '.join(ways)}"
    )


def _need(model: nn.Module, recipe: str | Term | Recipe, size: int, **shape: Any) -> int:
    costs = plan(model, recipe, batch_size=size, **shape).costs or {}
    if "unknown" in costs:
        why = costs["unknown"]
        raise TrainError(f"the memory of {type(model).__name__} cannot be estimated ({why}); set batch_size yourself")
    return int(costs["peak_bytes"])
