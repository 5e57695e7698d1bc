"""LoftQ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smidgen.methods.base import Method, Tensors
from smidgen.methods.low_rank.base import MapLike
from smidgen.methods.low_rank.lora import LoRA
from smidgen.sites.site import Site


@dataclass(frozen=True)
class LoftQ(LoRA):
    """LoRA on a quantised base that starts at what the quantisation lost.

    Li et al. 2023, LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, arXiv:2310.08659, section 3.

        W - Q ~ U S V^T, the largest `rank` values;  A0 = (S / s)^1/2 V^T,  B0 = U (S / s)^1/2,  s as in LoRA
        y = Q x + b + s * B A x
        W_merged = Q + s * B A

    Shapes:
        A: (rank, width_in)   starts at A0; where the map is not quantised uniform in +-1/sqrt(width_in), as in LoRA
        B: (width_out, rank)  starts at B0; where the map is not quantised zeros

    Fields:
        rank, alpha, target, layers, exclude, dropout, scaling, lr_ratio: as in LoRA.

    Departures: one step of the authors' alternation, since the base Q stays as it is; `smidgen.requantise` takes more
    before anything is attached. The original weights W are read again from where `smidgen.load` found them. What is
    saved is a LoRA: the start is nothing that the formula needs.
    """

    beyond_maps: ClassVar[tuple[type[Site], ...]] = ()

    def from_original(self, p: Tensors, base: Tensors, original: Tensor, site: MapLike) -> dict[str, Tensor]:
        U, S, V = torch.linalg.svd(original - base["weight"], full_matrices=False)
        root = (S[: self.rank] / self.scale).sqrt()
        return {"A": root[:, None] * V[: self.rank], "B": U[:, : self.rank] * root}

    def settled(self) -> Method:
        return LoRA(
            rank=self.rank,
            alpha=self.alpha,
            target=self.target,
            layers=self.layers,
            exclude=self.exclude,
            dropout=self.dropout,
            scaling=self.scaling,
            lr_ratio=self.lr_ratio,
            stack=self.stack,
        )

    def joined(self, methods: Sequence[Method]) -> Method | None:
        return None  # what is saved is a LoRA, and that adds up
