"""LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from smidgen.common.errors import RecipeError
from smidgen.methods.base import Method, Tensors
from smidgen.methods.field_checks import above, named, one_of
from smidgen.methods.functional import convolve, fan_in_uniform
from smidgen.methods.low_rank.base import LowRank, MapLike
from smidgen.sites.site import ConvSite, Site, TableSite, WeightSite
from smidgen.sites.targeting import as_names, check_targets, in_layers, names_weight


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
        W[e] + s * B[e] A[e]   at a weight that is read, while it is; of experts in one parameter, of each expert e
        y = conv(x, W) + b + s * conv1x1(conv(x, A), B)    at a convolution, with the stride, padding, ... of its own

    Shapes:
        A: (rank, width_in)   uniform in +-1/sqrt(width_in); at an embedding (rank, rows), zeros; at a convolution
            (rank, fan_in), fan_in = width_in / groups * places of the kernel, uniform in +-1/sqrt(fan_in)
            At a weight that is read, width_in is its last axis and width_out its last but one; experts have an axis
            of their own in front.
        B: (width_out, rank)  zeros; at an embedding normal, standard deviation 1 (as in the authors' code); at a
            convolution (width_out, rank / groups)

    Fields:
        rank, alpha: width of the bottleneck and strength. alpha does not follow the rank, so that ranks can be compared
            at one learning rate; alpha=None means alpha = rank (s = 1, or sqrt(rank) with "rslora").
        target: roles ("query", "key", "value", "attention_out", "ff_in", "ff_out"), "linear" for every linear
            map in the blocks (but gates with a single output), or endings of module paths ("q_proj"), which may be
            those of embeddings ("embed_tokens") and convolutions ("patch_embeddings.projection"). Merging one unties an
            output layer that shares its weight. A weight that is read and not called is named with its module:
            "experts.gate_up_proj", "attention.in_proj_weight" of nn.MultiheadAttention, "out_proj.weight".
        layers: as in LN.
        exclude: roles or endings of module paths to leave out.
        dropout: on the input of A, in training.
        scaling: "lora" or "rslora".
        lr_ratio: learning rate of B over that of A.

    Departures: the paper draws A from a normal distribution; its authors' code, and all since, from the uniform
    one above. Slices of a fused projection (GPT-2, Phi-3) each get a pair of their own.
    """

    beyond_maps: ClassVar[tuple[type[Site], ...]] = (TableSite, ConvSite, WeightSite)  # what acts where it is named

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
        beyond = [site for site in sites if self._is_named(site, as_names(self.target))]
        for field, names in (("target", self.target), ("exclude", self.exclude)):
            left = [n for n in as_names(names) if not any(self._is_named(site, (n,)) for site in beyond)]
            check_targets(type(self).__name__, field, left, sites)

    def acts(self, site: Site) -> bool:
        wanted = self._is_named(site, as_names(self.target)) and not self._is_named(site, as_names(self.exclude))
        return super().acts(site) or (wanted and in_layers(site, self.layers))

    def _is_named(self, site: Site, names: Sequence[str]) -> bool:
        """Whether an embedding, a convolution or a weight is named; roles do not stand for them."""
        if not isinstance(site, self.beyond_maps):
            return False
        return names_weight(site, names) if isinstance(site, WeightSite) else named(site, names)

    def init(self, site: MapLike) -> dict[str, Tensor]:
        self.check_rank(site)
        if isinstance(site, TableSite):
            return {"A": torch.zeros(self.rank, site.width_in), "B": torch.randn(site.width_out, self.rank)}
        if isinstance(site, ConvSite) and site.padding_mode != "zeros":
            raise RecipeError(
                f"{type(self).__name__}: the convolution {site.name} pads with {site.padding_mode!r}, not with zeros; "
                f"leave it out with exclude={site.path.rpartition('.')[2]!r}"
            )
        wide, groups = (site.fan_in, site.groups) if isinstance(site, ConvSite) else (site.width_in, 1)
        return {"A": fan_in_uniform(self.rank, wide), "B": torch.zeros(site.width_out, self.rank // groups)}

    def after(self, p: Tensors, x: Tensor, y: Tensor, site: MapLike) -> Tensor:
        if isinstance(site, ConvSite):
            return y + self.scale * _convolved(p, x, site)
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
        # sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...], in each group of a convolution
        scales = [w * m.scale for w, m in zip(weights, methods, strict=True) if isinstance(m, LoRA)]
        B = [s * p["B"] for s, p in zip(scales, parts, strict=True)]
        groups = site.groups if isinstance(site, ConvSite) else 1
        A = torch.cat([p["A"].unflatten(-2, (groups, -1)) for p in parts], dim=-2).flatten(-3, -2)
        return {"A": A, "B": torch.cat(B, dim=-1)}

    def merge(self, p: Tensors, weight: Tensor, bias: Tensor | None, site: MapLike) -> tuple[Tensor, Tensor | None]:
        groups = site.groups if isinstance(site, ConvSite) else 1
        if groups == 1:
            return weight + self.scale * (p["B"] @ p["A"]), bias
        products = p["B"].unflatten(0, (groups, -1)) @ p["A"].unflatten(0, (groups, -1))  # of each group
        return weight + self.scale * products.flatten(0, 1), bias


def _convolved(p: Tensors, x: Tensor, site: ConvSite) -> Tensor:
    """B A of a convolution, (..., width_out) from x (..., width_in), both with their places before the channels."""
    A = p["A"].unflatten(1, (site.width_in // site.groups, *site.kernel))
    hidden = convolve(x.movedim(-1, site.axis), A, site).movedim(site.axis, -1)  # (..., rank)
    if site.groups == 1:
        return F.linear(hidden, p["B"])
    parts = hidden.unflatten(-1, (site.groups, 1, -1)) @ p["B"].unflatten(0, (site.groups, -1)).mT
    return parts.flatten(-3)
