"""PiSSA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from smidgen.common.errors import RecipeError
from smidgen.methods.base import Tensors
from smidgen.methods.low_rank.base import MapLike
from smidgen.methods.low_rank.lora import LoRA
from smidgen.sites.site import Site


@dataclass(frozen=True)
class PiSSA(LoRA):
    """LoRA that starts at the principal singular values and vectors of the weight.

    Meng et al. 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation, arXiv:2404.02948, section 3.

        W ~ U S V^T, the largest `rank` values;  A0 = (S / s)^1/2 V^T,  B0 = U (S / s)^1/2,  s as in LoRA
        y = W x + b + s * (B A x - B0 A0 x)
        W_merged = W + s * (B A - B0 A0)

    Shapes:
        A: (rank, width_in)   starts at A0
        B: (width_out, rank)  starts at B0

    Fields:
        rank, target, layers, exclude, dropout, scaling, lr_ratio: as in LoRA.
        alpha: as in LoRA; None, the authors' choice, means alpha = rank. With scaling="rslora" give a number.
        iterations: of a randomised decomposition (4 is the authors' advice); None for an exact one.

    Departures: the authors take B0 A0 out of the stored weight; here the weight keeps its bits and the start is
    subtracted instead, which costs a second pair of products and puts A0 and B0 into the file.
    """

    alpha: float | None = None
    iterations: int | None = None

    beyond_maps: ClassVar[tuple[type[Site], ...]] = ()
    keeps: ClassVar[tuple[str, ...]] = ("A", "B")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations is not None and (type(self.iterations) is not int or self.iterations < 1):
            raise RecipeError(f"PiSSA: iterations={self.iterations!r} must be None or a whole number of at least 1")

    def from_base(self, p: Tensors, base: Tensors, site: MapLike) -> dict[str, Tensor]:
        if self.iterations is None:
            U, S, V = torch.linalg.svd(base["weight"], full_matrices=False)
            U, S, V = U[:, : self.rank], S[: self.rank], V[: self.rank]
        else:
            U, S, V = torch.svd_lowrank(base["weight"], self.rank, self.iterations)
            V = V.T
        root = (S / self.scale).sqrt()
        return {"A": root[:, None] * V, "B": U * root}

    def after(self, p: Tensors, x: Tensor, y: Tensor, site: MapLike) -> Tensor:
        now, start = (F.linear(F.linear(x, p[a]), p[b]) for a, b in (("A", "B"), ("A0", "B0")))
        return y + self.scale * (now - start)

    def merge(self, p: Tensors, weight: Tensor, bias: Tensor | None, site: MapLike) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * (p["B"] @ p["A"] - p["B0"] @ p["A0"]), bias
