"""Hydra."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from smidgen.common.errors import RecipeError
from smidgen.methods.base import Tensors
from smidgen.methods.field_checks import at_least
from smidgen.methods.functional import fan_in_uniform
from smidgen.methods.low_rank.base import LowRank, MapLike


@dataclass(frozen=True)
class Hydra(LowRank):
    """LoRA beside a linear map and a second one behind it, which reads what the map gives.

    Kim et al. 2024, Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning, arXiv:2309.06922,
    section 3.2.

        h = W x + b
        y = h + s * B A dropout(x) + s * D C h      s = alpha / rank, or 1 with alpha=None
        W_merged = W + s * (B A + D C W)
        b_merged = b + s * D C b

    Shapes:
        A: (rank, width_in)         uniform in +-1/sqrt(width_in)
        B: (width_out, rank)        zeros
        C: (sequential, width_out)  uniform in +-1/sqrt(width_out)
        D: (width_out, sequential)  zeros

    Fields:
        rank: of the parallel branch; 0 leaves it out.
        sequential: rank of the branch behind the map; 0 leaves it out, and the rest is LoRA.
        alpha: strength; None, the authors' choice for text, means s = 1. Without a parallel branch s = alpha /
            sequential.
        target: as in LoRA; the authors' choice for text is the second map of the feed-forward part.
        layers, exclude, dropout: as in LoRA.

    Departures: the vision models of the authors have biases in both branches and dropout between their two maps; here
    there is neither. Where other terms act at the map too, C reads what they have made of h.
    """

    rank: int = 4
    alpha: float | None = None
    target: str | tuple[str, ...] = ("ff_out",)
    sequential: int = 8

    least_rank: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("Hydra", "sequential", self.sequential, 0)
        if self.rank == self.sequential == 0:
            raise RecipeError("Hydra: rank=0 and sequential=0 leave nothing to train; give one of them at least 1")

    @property
    def scale(self) -> float:
        """alpha / rank, of the branch that is there; alpha=None means 1."""
        return 1.0 if self.alpha is None else self.alpha / (self.rank or self.sequential)

    def init(self, site: MapLike) -> dict[str, Tensor]:
        self.check_rank(site)
        if self.sequential > site.width_out:
            raise RecipeError(
                f"Hydra: sequential={self.sequential} is above the width of what {site.name} gives "
                f"({site.width_out}); at most that works, or exclude={site.path.rpartition('.')[2]!r}"
            )
        found: dict[str, Tensor] = {}
        if self.rank:
            found |= {"A": fan_in_uniform(self.rank, site.width_in), "B": torch.zeros(site.width_out, self.rank)}
        if self.sequential:
            found |= {
                "C": fan_in_uniform(self.sequential, site.width_out),
                "D": torch.zeros(site.width_out, self.sequential),
            }
        return found

    def after(self, p: Tensors, x: Tensor, y: Tensor, site: MapLike) -> Tensor:
        parallel = self.scale * F.linear(F.linear(x, p["A"]), p["B"]) if self.rank else 0
        behind = self.scale * F.linear(F.linear(y, p["C"]), p["D"]) if self.sequential else 0
        return y + parallel + behind

    def merge(self, p: Tensors, weight: Tensor, bias: Tensor | None, site: MapLike) -> tuple[Tensor, Tensor | None]:
        merged, moved = weight, bias
        if self.rank:
            merged = merged + self.scale * (p["B"] @ p["A"])
        if self.sequential:
            merged = merged + self.scale * (p["D"] @ (p["C"] @ weight))
            moved = None if bias is None else bias + self.scale * (p["D"] @ (p["C"] @ bias))
        return merged, moved
