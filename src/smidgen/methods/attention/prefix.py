"""Prefix-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from smidgen.methods.base import Method, Tensors
from smidgen.methods.field_checks import at_least, flag, layers_field
from smidgen.sites.site import KeyValueSite, Site
from smidgen.sites.targeting import Layers, in_layers


@dataclass(frozen=True)
class Prefix(Method[KeyValueSite]):
    """Put trained keys and values before those of the text, in every attention.

    Li and Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation, arXiv:2101.00190, section 4.
    Liu et al. 2021, P-Tuning v2, arXiv:2110.07602, section 3.3 (no reparametrisation).
    Yang et al. 2022, Tensor Programs V, arXiv:2203.03466, table 3 (how Adam's rate follows the width).

        attention(q) = softmax(q [K; K_text]^T / sqrt(head_dim)) [V; V_text]
        mlp=m:  [K; V] = W2 tanh(W1 E + b1) + b2       trained through E, W1, b1, W2, b2 and saved as K and V
                at min(1, 8 / m) times the learning rate

    Shapes:
        K: (heads, length, head_dim)  normal, standard deviation 0.02; of key heads, behind rotary positions
        V: (heads, length, value_dim)  as K
        E: (length, mlp)  normal, standard deviation 1
        W1: (mlp, mlp)  uniform in +-1/sqrt(mlp)
        b1: (mlp,)  zeros
        W2: (2 * heads * head_dim, mlp)  normal, so wide that K and V start as they do without it
        b2: (2 * heads * head_dim,)  zeros

    Fields:
        length: number of keys and values.
        mlp: width of the reparametrisation, None for none.
        cross: cross-attention as well, where there is one.
        layers: as in LN.

    Where values are not as wide as keys (DeepSeek), W2 and b2 have heads * (head_dim + value_dim) rows.

    Departures: the paper draws the prefix from one table and network for all layers; here each layer has its own. The
    recipe MAM of He et al. trains its prefix through a network of width 800; by its name it has none here, and is saved
    the same with mlp=800.
    Positions of the text stay what they are: a prefix has none. A causal text sees all of the prefix.
    """

    length: int = 30
    mlp: int | None = None
    cross: bool = True
    layers: Layers = None

    lr: ClassVar[float] = 3e-2
    narrow: ClassVar[int] = 8
    exceptions: ClassVar[dict[str, str]] = {
        "starts_as_identity": "any further key takes its share of the attention from the text"
    }

    def __post_init__(self) -> None:
        at_least("Prefix", "length", self.length, 1)
        if self.mlp is not None:
            at_least("Prefix", "mlp", self.mlp, 1)
        flag("Prefix", "cross", self.cross)
        layers_field("Prefix", self.layers)

    def acts(self, site: Site) -> bool:
        wanted = isinstance(site, KeyValueSite) and (self.cross or "cross_attention" not in site.roles)
        return wanted and in_layers(site, self.layers)

    def rate(self, term: str) -> float:
        # a step of Adam moves a sum over mlp values by as many times its rate
        return min(1.0, self.narrow / self.mlp) if self.mlp is not None else 1.0

    def init(self, site: KeyValueSite) -> dict[str, Tensor]:
        if self.mlp is None:
            rows = (site.heads, self.length)
            return {"K": 0.02 * torch.randn(*rows, site.head_dim), "V": 0.02 * torch.randn(*rows, site.value_dim)}
        width, bound = site.heads * (site.head_dim + site.value_dim), 1 / math.sqrt(self.mlp)
        E, W1 = torch.randn(self.length, self.mlp), torch.empty(self.mlp, self.mlp).uniform_(-bound, bound)
        hidden = torch.tanh(F.linear(E, W1)).square().sum(1).mean()  # what a variance of 1 in W2 would become
        return {
            "E": E,
            "W1": W1,
            "b1": torch.zeros(self.mlp),
            "W2": 0.02 / hidden.sqrt() * torch.randn(width, self.mlp),
            "b2": torch.zeros(width),
        }

    def settled(self) -> Prefix:
        return replace(self, mlp=None)

    def settle(self, p: Tensors, site: KeyValueSite) -> dict[str, Tensor]:
        if self.mlp is None:
            return dict(p)
        both = F.linear(torch.tanh(F.linear(p["E"], p["W1"], p["b1"])), p["W2"], p["b2"])
        keys, values = both.split([site.heads * site.head_dim, site.heads * site.value_dim], dim=1)
        by_head = (t.unflatten(1, (site.heads, -1)).transpose(0, 1).contiguous() for t in (keys, values))
        return dict(zip(("K", "V"), by_head, strict=True))

    def keys_values(self, p: Tensors, site: KeyValueSite) -> tuple[Tensor, Tensor]:
        return p["K"], p["V"]

    def unmergeable(self, site: KeyValueSite) -> str | None:
        return "keys and values of its own are no part of a weight"
