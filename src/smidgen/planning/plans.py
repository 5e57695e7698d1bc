"""Plan: what a recipe trains on a model, counted and priced before anything is touched."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from smidgen.planning.entry import Entry, Shape
from smidgen.planning.gaps import Gap
from smidgen.planning.saved_layout import safetensors_size
from smidgen.recipe.recipe import Recipe
from smidgen.sites.site import Site


@dataclass(frozen=True)
class Plan:
    """What a recipe will do to a model. The head is counted apart, the same in every recipe.

    Attributes:
        recipe: what the plan is of.
        model: name of the model's class.
        entries: one for each method at each site, and for each owner of shared tensors, in the recipe's order.
        head: name and shape of each tensor of the head.
        pretrained: number of the model's values, the head's left out.
        pooling: the one that was asked for; None for the class's own.
        reads: the class's own pooling.
        costs: bytes and FLOPs of a training step, see `smidgen.plan`; None where they were not asked for.
        chosen: whether a selection has been applied, so that counts are those of what is kept.
        low: sites of the head in or below the blocks: tensors that the checkpoint lacked.
        spare: names of the head's tensors that are new in the base, which the model may not use.
        unread: paths of modules that the model's class or configuration never reads, where the recipe would have
            trained something.
        left_out: what the recipe's words would cover and it does not, by place and reason.
    """

    recipe: Recipe
    model: str
    entries: tuple[Entry, ...]
    head: tuple[tuple[str, Shape], ...]
    pretrained: int
    pooling: str | None
    reads: str | None
    costs: dict[str, Any] | None = field(default=None, compare=False)
    chosen: bool = False
    low: tuple[Site, ...] = field(default=(), compare=False)
    spare: tuple[str, ...] = field(default=(), compare=False)
    unread: tuple[str, ...] = field(default=(), compare=False)
    left_out: tuple[Gap, ...] = field(default=(), compare=False)

    @property
    def rows(self) -> tuple[Entry, ...]:
        """Deprecated: the former name of `entries`."""
        return self.entries

    @property
    def places(self) -> list[Site]:
        """Where something is trained that what lies above depends on, the class's own head apart."""
        return [entry.site for entry in self.entries if not entry.owns_shared] + list(self.low)

    @property
    def pending(self) -> bool:
        """Whether the recipe narrows and the values are not chosen yet: counts are those of the candidates."""
        return bool(self.recipe.narrowed) and not self.chosen

    @property
    def trained(self) -> int:
        """Trained values, head apart."""
        return sum(entry.values for entry in self.entries)

    @property
    def head_values(self) -> int:
        """Values of the head."""
        return sum(prod(shape) for _, shape in self.head)

    @property
    def share(self) -> float:
        """Trained values over pretrained values, head apart."""
        return self.trained / self.pretrained

    @property
    def shapes(self) -> dict[str, Shape]:
        """Saved name -> shape of all trained tensors, head included."""
        return {name: shape for entry in self.entries for name, shape in entry.names()} | dict(self.head)

    @property
    def saved(self) -> dict[str, Shape]:
        """Saved name -> shape of everything in the delta's file: `shapes`, with the indices of subsets."""
        return {name: shape for entry in self.entries for name, shape in entry.saved()} | dict(self.head)

    @property
    def file_bytes(self) -> int:
        """Size of the safetensors file in bytes, exactly."""
        return safetensors_size(self.saved)

    @property
    def lowest(self) -> str:
        """The lowest edited place: nothing below it needs a gradient."""
        placed = self.places
        if not placed:
            return "head"
        if any(site.layer is None and "final" not in site.roles for site in placed):
            return "embeddings"
        layers = [(site.stack, site.layer) for site in placed if site.layer is not None]
        if not layers:
            return "final norm"
        lowest: dict[str, int] = {}
        for stack, layer in layers:
            lowest[stack] = min(layer, lowest.get(stack, layer))
        return ", ".join(f"{stack}.{layer}" for stack, layer in lowest.items())

    def to_json(self) -> dict[str, object]:
        """The plan as plain data."""
        return {
            "recipe": str(self.recipe),
            "model": self.model,
            "trained": self.trained,
            "head": self.head_values,
            "pretrained": self.pretrained,
            "share": self.share,
            "file_bytes": self.file_bytes,
            "lowest": self.lowest,
            "pooling": self.pooling or self.reads,
            "costs": self.costs,
            "narrowed": "later" if self.pending else self.chosen,
            "unread": list(self.unread),
            "left_out": [asdict(gap) for gap in self.left_out],
            "tensors": {name: list(shape) for name, shape in self.saved.items()},
        }

    def __str__(self) -> str:
        lines = [f"{self.recipe} on {self.model}"]
        lines += [f"  {name:<60} {list(shape)}" for entry in self.entries for name, shape in entry.names()]
        lines.append(
            f"trains {self.trained:,} of {self.pretrained:,} values ({self.share:.4%}); "
            f"head apart {self.head_values:,}; file {self.file_bytes:,} bytes; lowest edit: {self.lowest}"
        )
        lines += [f"left out, never read: {path}" for path in self.unread]
        lines += [f"left out by {gap.method}: {gap}" for gap in self.left_out]
        return "\n".join(lines)
