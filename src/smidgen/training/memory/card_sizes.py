"""device_fits: the memory of a training step for several recipes, and the smallest card that it fits into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from smidgen.common.errors import PlanError
from smidgen.recipe.recipe import Recipe, Term
from smidgen.training.memory.estimate import plan

CARDS = (8, 16, 24, 48, 80)  # GiB
HELD = 2**30  # bytes that driver, kernels and the allocator's rounding take of a card
RECIPES = ("LN()", "LN(layers='top:2')", "BitFit()", "IA3()", "LoRA(rank=8)", "Full()")


@dataclass(frozen=True)
class DeviceFit:
    """One recipe on a model.

    Attributes:
        trained: values.
        peak_bytes: the most that is alive at once in a step (see `plan`); None where it cannot be counted.
        card: smallest of `CARDS`, GiB, that holds it beside `HELD`; None if none does.
        why: why there is no number, in a line.
    """

    recipe: str
    dtype: str
    trained: int
    peak_bytes: int | None
    card: int | None
    why: str = ""

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


def device_fits(
    model: nn.Module,
    recipes: Sequence[str | Term | Recipe] = RECIPES,
    *,
    batch_size: int = 1,
    length: int | None = None,
    recompute: bool = False,
) -> Iterator[DeviceFit]:
    """A `DeviceFit` for each recipe, as they are counted; a recipe that the model does not allow has no number.

    Args:
        model: with content or without (see `load_shapes`).
        batch_size, length, recompute: as in `plan`.
    """
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    for recipe in recipes:
        try:
            found = plan(model, recipe, batch_size=batch_size, length=length, recompute=recompute)
        except PlanError as error:
            yield DeviceFit(str(recipe), dtype, 0, None, None, str(error))
            continue
        costs = found.costs or {}
        peak = costs.get("peak_bytes")
        if not isinstance(peak, int):
            why = str(costs.get("unknown", "not counted"))
            yield DeviceFit(str(found.recipe), dtype, found.trained, None, None, why)
            continue
        card = next((size for size in CARDS if peak + HELD <= size * 2**30), None)
        yield DeviceFit(str(found.recipe), dtype, found.trained, peak, card)
