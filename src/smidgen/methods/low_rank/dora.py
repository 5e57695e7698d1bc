"""DoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from smidgen.methods.base import Tensors
from smidgen.methods.low_rank.base import MapLike
from smidgen.methods.low_rank.lora import LoRA
from smidgen.sites.site import Site


@dataclass(frozen=True)
class DoRA(LoRA):
    """Train the length of each row of a weight, and its direction by LoRA.

    Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353, section 4.1; section 4.3 for the
    norm without gradient.

        V = W + s * B A              s as in LoRA
        W_merged = m * V / |V|       |V| (width_out,): the norm of each row, a constant to the gradient
        y = m / |V| * (V x) + b

    Shapes:
        A: (rank, width_in)   uniform in +-1/sqrt(width_in)
        B: (width_out, rank)  zeros
        m: (width_out,)  starts at |W|

    Fields:
        rank, alpha, target, layers, exclude, dropout, scaling, lr_ratio: as in LoRA.

    Departures: dropout acts on the input of A alone, where the authors drop what W multiplies as well. The weight is
    read in master precision at every call, which costs a product of B and A each time.
    """

    beyond_maps: ClassVar[tuple[type[Site], ...]] = ()

    def init(self, site: MapLike) -> dict[str, Tensor]:
        return {**super().init(site), "m": torch.ones(site.width_out)}

    def from_base(self, p: Tensors, base: Tensors, site: MapLike) -> dict[str, Tensor]:
        return {**p, "m": _lengths(base["weight"])}

    def after_with(self, p: Tensors, x: Tensor, y: Tensor, base: Tensors, site: MapLike) -> Tensor:
        weight, bias = base["weight"], base.get("bias")
        v = weight + self.scale * (p["B"] @ p["A"]).to(weight.dtype)
        ratio = p["m"] / _lengths(v.detach())
        unbiased = y if bias is None else y - bias
        low = self.scale * F.linear(F.linear(x, p["A"]), p["B"])
        # so written that y is left as it is where the ratio is 1 and B is zero, and that one product with the ratio is
        # kept for its gradient
        return y + (ratio - 1) * (unbiased + low) + low

    def merge(self, p: Tensors, weight: Tensor, bias: Tensor | None, site: MapLike) -> tuple[Tensor, Tensor | None]:
        v = weight + self.scale * (p["B"] @ p["A"])
        return (p["m"] / _lengths(v.detach()))[:, None] * v, bias


def _lengths(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=1)
