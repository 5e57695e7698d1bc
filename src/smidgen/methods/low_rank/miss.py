"""MiSS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from smidgen.common.errors import RecipeError
from smidgen.methods.base import Tensors
from smidgen.methods.field_checks import at_least
from smidgen.methods.low_rank.base import LowRank, MapLike


@dataclass(frozen=True)
class MiSS(LowRank):
    """One trained block that is added to every group of a linear map's input columns.

    Kang and Yin 2024, Balancing LoRA Performance and Efficiency with Simple Shard Sharing, arXiv:2409.15371, section 3
    of version 5. Versions 1 to 3 call "Bone" what is `BAT` here, version 4 calls "Bone" what is MiSS here.

        y = W x + b + D^T sum_k x_k         x_k (rank,): the k-th group of inputs, the last one filled up with zeros
        W_merged = W + [D^T, D^T, ...]      cut to width_in

    Shapes:
        D: (rank, width_out)  zeros

    Fields:
        rank: size of a group of inputs. The change is of that rank at most.
        mini: outputs that D has values for: D then has `mini` columns, which stand width_out / mini times side by side;
            None for all of them.
        target: as in LoRA; the authors tune all maps of the blocks.
        layers, exclude, dropout: as in LoRA.

    Departures: none in the formula. The authors' rank is 64; 8 here has half the values of LoRA's 8. There is no
    strength: `alpha` stays None.
    """

    rank: int = 8
    alpha: float | None = None
    target: str | tuple[str, ...] = "linear"
    mini: int | None = None

    lr: ClassVar[float] = 1e-3
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            raise RecipeError(f"MiSS: alpha={self.alpha!r}, and the formula has no strength; leave it out")
        if self.mini is not None:
            at_least("MiSS", "mini", self.mini, 1)

    def init(self, site: MapLike) -> dict[str, Tensor]:
        if self.rank > site.width_in:
            raise RecipeError(
                f"MiSS: rank={self.rank} is above the inputs of {site.name} ({site.width_in}); at most that works, or "
                f"exclude={site.path.rpartition('.')[2]!r}"
            )
        if self.mini is not None and site.width_out % self.mini:
            raise RecipeError(
                f"MiSS: mini={self.mini} does not divide the {site.width_out} outputs of {site.name}; take one that "
                f"does, or exclude={site.path.rpartition('.')[2]!r}"
            )
        return {"D": torch.zeros(self.rank, self.mini or site.width_out)}

    def after(self, p: Tensors, x: Tensor, y: Tensor, site: MapLike) -> Tensor:
        short = -site.width_in % self.rank
        groups = F.pad(x, (0, short)).unflatten(-1, (-1, self.rank))  # (..., groups, rank)
        return y + groups.sum(-2) @ self._whole(p["D"], site)

    def merge(self, p: Tensors, weight: Tensor, bias: Tensor | None, site: MapLike) -> tuple[Tensor, Tensor | None]:
        times = -(-site.width_in // self.rank)
        return weight + self._whole(p["D"], site).mT.repeat(1, times)[:, : site.width_in], bias

    def _whole(self, D: Tensor, site: MapLike) -> Tensor:
        """(..., rank, width_out)."""
        return D if self.mini is None else torch.cat([D] * (site.width_out // self.mini), dim=-1)
