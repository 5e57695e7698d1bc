"""Fisher information by component, layer and term: total mass and mean per value, which rank differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.common.errors import ModelError
from smidgen.common.json_numbers import plain
from smidgen.common.wrappers import bare
from smidgen.studies.experiments.model_components import (
    ComponentPart,
    Key,
    components,
    grouped,
    known_components,
    part_of,
)


@dataclass(frozen=True)
class Mass:
    """Fisher information of a group of values.

    Attributes:
        total: the sum over its values.
        share: of the sum over everything that was measured.
        mean: per value.
        values: how many there are.
    """

    total: float
    share: float
    mean: float
    values: int


@dataclass(frozen=True, eq=False)
class FisherMass:
    """Where Fisher information lies in a model.

    Attributes:
        model, task, kind: what it was measured on and how.
        parts: the measured parts, head left out.
        totals: the sum over each part's values.
        sizes: how many values each part has.
    """

    model: str
    parts: tuple[ComponentPart, ...]
    totals: tuple[float, ...]
    sizes: tuple[int, ...]
    task: str = ""
    kind: str = ""
    info: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        scores: Mapping[str, Tensor],
        *,
        task: str = "",
        kind: str = "",
        info: Mapping[str, object] | None = None,
    ) -> FisherMass:
        """From what `fisher` gives: saved name -> tensor of squared gradients. A head's tensors are left out.

        Raises:
            ModelError: a name that the model lacks, a value below zero or not finite, or no information at all.
        """
        model = bare(model)
        known, measured = components(model), []
        for name, tensor in scores.items():
            if not torch.isfinite(tensor).all() or (tensor < 0).any():
                raise ModelError(f"{name} has Fisher information below zero or not finite")
            for part in part_of(known, name):
                values = part.of(tensor).double()
                if part.component != "head":
                    measured.append((part, float(values.sum()), values.numel()))
        if not any(total for _, total, _ in measured):
            raise ModelError(f"no Fisher information in {len(measured)} tensors: all of it is zero")
        parts, totals, sizes = zip(*measured, strict=True)
        config = getattr(model, "config", None)
        name = str(getattr(config, "_name_or_path", "") or type(model).__name__)
        return cls(name, parts, totals, sizes, task, kind, info or {})

    @property
    def components(self) -> list[str]:
        """The components that were measured."""
        return known_components(self.parts)

    def table(self, by: Sequence[str] = ("component",)) -> dict[Key, Mass]:
        """Key (of the fields of a part named by `by`) -> mass, in the order of the components."""
        return {key: self._mass(members) for key, members in grouped(self.parts, by).items()}

    def ranking(self, of: str = "total", by: str = "component") -> list[Any]:
        """Groups from the largest "total" or "mean" to the smallest."""
        found = self.table((by,))
        return sorted((key[0] for key in found), key=lambda name: -getattr(found[name,], of))

    def to_json(self) -> dict[str, object]:
        """Plain data: every part, and the tables by component, layer and term."""
        tables = {}
        for by in (("component",), ("stack", "layer"), ("term",), ("component", "term")):
            rows = [{**dict(zip(by, key, strict=True)), **asdict(mass)} for key, mass in self.table(by).items()]
            tables[" x ".join(by)] = rows
        whole: dict[str, object] = {"model": self.model, "task": self.task, "fisher": self.kind, **self.info}
        numbers = zip(self.parts, self.totals, self.sizes, strict=True)
        whole["parts"] = [{**asdict(part), "total": total, "values": size} for part, total, size in numbers]
        return plain({**whole, "tables": tables})

    def _mass(self, members: Sequence[int]) -> Mass:
        total, values = sum(self.totals[i] for i in members), sum(self.sizes[i] for i in members)
        return Mass(total, total / sum(self.totals), total / values if values else 0.0, values)
