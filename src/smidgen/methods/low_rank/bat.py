"""BAT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from smidgen.common.errors import RecipeError
from smidgen.methods.base import Tensors
from smidgen.methods.low_rank.base import LowRank, MapLike


@dataclass(frozen=True)
class BAT(LowRank):
    """An affine change of a linear map in blocks, guided by the weight; its first name is Bone.

    Kang 2024, Bone: Block-Affine Adaptation of Large Language Models, arXiv:2409.15371, section 3 of
    versions 1 to 3; called BAT from version 4 on, where "Bone" means what is `MiSS` here.

        W in blocks W_jk (rank, rank), j along the outputs, k along the inputs
        W'_jk = W_jk + W_jk M_j + M_j
        y = W' x + b
        W_merged = W'

    Shapes:
        M: (width_out / rank, rank, rank)  zeros

    Fields:
        rank: side of a block; both sides of the map must be multiples of it. The change is not of low rank.
        target: as in LoRA; the authors tune all maps of the blocks.
        layers, exclude, dropout: as in LoRA.

    Departures: none in the formula; M is the papers' "bone". The authors' rank is 64; 8 here fits small models too.
    There is no strength: `alpha` stays None. The change of the weight is computed at every call in master precision,
    and kept for the backward pass.
    """

    rank: int = 8
    alpha: float | None = None
    target: str | tuple[str, ...] = "linear"

    lr: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            raise RecipeError(f"BAT: alpha={self.alpha!r}, and the formula has no strength; leave it out")

    def init(self, site: MapLike) -> dict[str, Tensor]:
        if site.width_in % self.rank or site.width_out % self.rank:
            raise RecipeError(
                f"BAT: rank={self.rank} does not divide both sides of {site.name} ({site.width_out} x "
                f"{site.width_in}); take one that does, or exclude={site.path.rpartition('.')[2]!r}"
            )
        return {"M": torch.zeros(site.width_out // self.rank, self.rank, self.rank)}

    def after_with(self, p: Tensors, x: Tensor, y: Tensor, base: Tensors, site: MapLike) -> Tensor:
        return y + F.linear(x, self._change(p["M"], base["weight"]).to(x.dtype))

    def merge(self, p: Tensors, weight: Tensor, bias: Tensor | None, site: MapLike) -> tuple[Tensor, Tensor | None]:
        return weight + self._change(p["M"], weight), bias

    def _change(self, M: Tensor, weight: Tensor) -> Tensor:
        """W' - W, (width_out, width_in)."""
        blocks = weight.unflatten(0, (-1, self.rank)).unflatten(2, (-1, self.rank))  # (j, rank, k, rank)
        moved = torch.einsum("jakb,jbc->jakc", blocks, M.to(weight.dtype)) + M.to(weight.dtype)[:, :, None]
        return moved.flatten(2).flatten(0, 1)
