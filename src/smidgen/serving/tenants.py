"""Tenant: one delta in memory, as the rows of a mixed batch take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from smidgen.common.errors import DeltaError
from smidgen.delta.delta import Delta
from smidgen.inference.task_record import TaskRecord
from smidgen.planning.entry import Shape
from smidgen.planning.plans import Plan
from smidgen.planning.saved_layout import is_value
from smidgen.recipe.recipe import Recipe


@dataclass(frozen=True)
class Profile:
    """What is known of a delta beside its values.

    Attributes:
        recipe: its spelling.
        task: what its inputs are like.
        labels: names in id order.
        metrics: of its training's validation.
        trained, head: numbers of values.
    """

    recipe: str
    task: TaskRecord
    labels: tuple[str, ...]
    metrics: Mapping[str, float]
    trained: int
    head: int

    @classmethod
    def of(cls, delta: Delta) -> Profile:
        """Of a delta's own record."""
        metrics = _numbers(delta.info.get("scores"))
        task = TaskRecord.of(delta.info)
        return cls(str(delta.recipe), task, delta.labels, metrics, delta.trained, delta.head_values)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Profile:
        """Of a delta's JSON, whose values are not read. Raises DeltaError if it is damaged."""
        try:
            sizes = {name: prod(spec["shape"]) for name, spec in record["tensors"].items() if is_value(name)}
            head = sum(size for name, size in sizes.items() if name in record["head"])
            recipe, info = str(Recipe.from_json(record["recipe"])), record["info"]
            metrics, labels = _numbers(info.get("scores")), tuple(record["labels"])
            return cls(recipe, TaskRecord.of(info), labels, metrics, sum(sizes.values()) - head, head)
        except (KeyError, TypeError, AttributeError) as error:
            raise DeltaError(f"a delta's JSON is damaged: {type(error).__name__} {error}") from None


def _numbers(scores: Mapping[str, object] | None) -> dict[str, float]:
    """Those of some scores that are numbers."""
    return {name: float(value) for name, value in (scores or {}).items() if isinstance(value, int | float)}


@dataclass(frozen=True, eq=False)
class RowLayout:
    """Where the values of a recipe's tensors lie in one row of numbers.

    Attributes:
        key: name on the model.
        places: saved name -> (offset, shape), the head's tensors apart.
        size: numbers in a row.
        base: (size,), of values trained in place what the base has; what a tenant with few values starts from.
        prompt: vectors among a text's tokens: rows of one batch have the same number.
    """

    key: str
    plan: Plan
    places: Mapping[str, tuple[int, Shape]]
    size: int
    base: Tensor
    prompt: int = 0

    def tables(self, rows: Tensor) -> dict[str, Tensor]:
        """Saved name -> (n, *shape) of rows (n, size)."""
        return {
            name: rows[:, offset : offset + prod(shape)].view(len(rows), *shape)
            for name, (offset, shape) in self.places.items()
        }


@dataclass(frozen=True, eq=False)
class Tenant:
    """One delta's values.

    Attributes:
        layout: None for a delta that trains the head alone.
        values: (size,) of the layout, or (k,) at `places` of it.
        places: (k,) int64 into a row, None where all values are there.
        head: name -> tensor.
        pooling: None for the class's own.
    """

    name: str
    profile: Profile
    layout: RowLayout | None
    values: Tensor
    places: Tensor | None = None
    head: Mapping[str, Tensor] = field(default_factory=dict)
    pooling: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        places = 0 if self.places is None else self.places.nbytes
        return int(self.values.nbytes + places + sum(tensor.nbytes for tensor in self.head.values()))

    @property
    def prompt(self) -> int:
        """Vectors among a text's tokens."""
        return 0 if self.layout is None else self.layout.prompt

    @property
    def order(self) -> str:
        """Rows of one layout stand together in a batch."""
        return "" if self.layout is None else self.layout.key

    def row(self) -> Tensor:
        """(size,), all of its layout's numbers."""
        if self.places is None:
            return self.values
        assert self.layout is not None
        return self.layout.base.index_copy(0, self.places, self.values)
