"""IA3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smidgen.fields import Layers, in_layers, layers_field
from smidgen.method import Method, Tensors
from smidgen.sites import Site


@dataclass(frozen=True)
class IA3(Method):
    """Rescale keys, values and the inner activations of the feed-forward network.

    Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning,
    arXiv:2205.05638, section 3.3.

        key, value:    y = l * (W x + b)         W_merged = diag(l) W,  b_merged = l * b
        feed-forward:  y = W (l * x) + b         W_merged = W diag(l)

    Shapes:
        l: (width_out,) at keys and values, (width_in,) at the second feed-forward map; ones

    Fields:
        layers: as in LN.

    Departures: none. In a gated feed-forward network l scales the gated product, as in the authors' T0 models.
    """

    layers: Layers = None

    lr: ClassVar[float] = 1e-2
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        layers_field("IA3", self.layers)

    def acts(self, site: Site) -> bool:
        roles = site.roles & {"key", "value", "ff_out"}
        return site.kind == "linear" and bool(roles) and in_layers(site, self.layers)

    def init(self, site: Site) -> dict[str, Tensor]:
        return {"l": torch.ones(site.width_in if "ff_out" in site.roles else site.width_out)}

    def before(self, p: Tensors, x: Tensor, site: Site) -> Tensor:
        return p["l"] * x if "ff_out" in site.roles else x

    def after(self, p: Tensors, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return y if "ff_out" in site.roles else p["l"] * y

    def merge(self, p: Tensors, weight: Tensor, bias: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        if "ff_out" in site.roles:
            return weight * p["l"], bias
        return p["l"][:, None] * weight, None if bias is None else p["l"] * bias
