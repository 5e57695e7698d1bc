"""LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from smidgen.methods.base import Method, Tensors
from smidgen.methods.field_checks import above, at_table, one_of
from smidgen.methods.low_rank.base import LowRank, MapLike
from smidgen.sites.site import Site, TableSite
from smidgen.sites.targeting import as_names, check_targets, in_layers


@dataclass(frozen=True)
class LoRA(LowRank):
    """Add a product of two thin matrices to a linear map.

    Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685, section 4.1.
    Kalajdzievski 2023, A Rank Stabilization Scaling Factor (rsLoRA), arXiv:2312.03732, section 3 (scaling="rslora").
    Hayou et al. 2024, LoRA+, arXiv:2402.12354, section 4 (lr_ratio; they suggest 16).

        y = W x + b + s * B A dropout(x)        s = alpha / rank, or alpha / sqrt(rank) with scaling="rslora"
        W_merged = W + s * B A
        lr(B) = lr_ratio * lr(A)
        y = W[i] + s * B A[:, i]                at an embedding, of row i

    Shapes:
        A: (rank, width_in)   uniform in +-1/sqrt(width_in); at an embedding (rank, rows), zeros
        B: (width_out, rank)  zeros; at an embedding normal, standard deviation 1 (as in the authors' code)

    Fields:
        rank, alpha: width of the bottleneck and strength. alpha does not follow the rank, so that ranks can be compared
            at one learning rate; alpha=None means alpha = rank (s = 1, or sqrt(rank) with "rslora").
        target: roles ("query", "key", "value", "attention_out", "ff_in", "ff_out"), "linear" for every linear
            map in the blocks (but gates with a single output), or endings of module paths ("q_proj"), which may be
            those of embeddings ("embed_tokens"). Merging one unties an output layer that shares its weight.
        layers: as in LN.
        exclude: roles or endings of module paths to leave out.
        dropout: on the input of A, in training.
        scaling: "lora" or "rslora".
        lr_ratio: learning rate of B over that of A.

    Departures: the paper draws A from a normal distribution; its authors' code, and all since, from the uniform
    one above. Slices of a fused projection (GPT-2, Phi-3) each get a pair of their own.
    """

    tables: ClassVar[bool] = True

    scaling: str = "lora"
    lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        one_of(name, "scaling", self.scaling, ("lora", "rslora"))
        above(name, "lr_ratio", self.lr_ratio, 0)

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank)."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank if self.scaling == "lora" else math.sqrt(self.rank))

    def rate(self, term: str) -> float:
        return self.lr_ratio if term == "B" else 1.0

    def check(self, sites: Sequence[Site]) -> None:
        names = [n for n in as_names(self.target) if not any(self._looks_up(site, (n,)) for site in sites)]
        check_targets(type(self).__name__, "target", names, sites)
        check_targets(type(self).__name__, "exclude", as_names(self.exclude), sites)

    def acts(self, site: Site) -> bool:
        return super().acts(site) or (self._looks_up(site, as_names(self.target)) and in_layers(site, self.layers))

    def _looks_up(self, site: Site, names: Sequence[str]) -> bool:
        return self.tables and at_table(site, names)

    def init(self, site: MapLike) -> dict[str, Tensor]:
        self.check_rank(site)
        if isinstance(site, TableSite):
            return {"A": torch.zeros(self.rank, site.width_in), "B": torch.randn(site.width_out, self.rank)}
        bound = 1 / math.sqrt(site.width_in)
        A = torch.empty(self.rank, site.width_in).uniform_(-bound, bound)
        return {"A": A, "B": torch.zeros(site.width_out, self.rank)}

    def after(self, p: Tensors, x: Tensor, y: Tensor, site: MapLike) -> Tensor:
        hidden = F.embedding(x, p["A"].T) if isinstance(site, TableSite) else F.linear(x, p["A"])  # (..., rank)
        return y + self.scale * F.linear(hidden, p["B"])  # (..., width_out)

    def joined(self, methods: Sequence[Method]) -> Method | None:
        if any(type(method) is not LoRA for method in methods):
            return None  # a subclass has another formula
        ranks = [method.rank for method in methods if isinstance(method, LoRA)]
        return replace(self, rank=sum(ranks), alpha=None, scaling="lora")  # s = 1

    def join(
        self, weights: Sequence[float], methods: Sequence[Method], parts: Sequence[Tensors], site: MapLike
    ) -> dict[str, Tensor]:
        # sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]
        scales = [w * m.scale for w, m in zip(weights, methods, strict=True) if isinstance(m, LoRA)]
        B = [s * p["B"] for s, p in zip(scales, parts, strict=True)]
        return {"A": torch.cat([p["A"] for p in parts]), "B": torch.cat(B, dim=1)}

    def merge(self, p: Tensors, weight: Tensor, bias: Tensor | None, site: MapLike) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * (p["B"] @ p["A"]), bias
