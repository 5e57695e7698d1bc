"""SSF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smidgen.methods.base import Method, Tensors
from smidgen.methods.field_checks import flag, layers_field, names_field
from smidgen.sites.site import ConvSite, NormSite, OwnerSite, Site
from smidgen.sites.targeting import Layers, as_names, check_targets, in_layers, targeted


@dataclass(frozen=True)
class SSF(Method[OwnerSite]):
    """Scale and shift the outputs of linear maps, convolutions and norms.

    Lian et al. 2022, Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning, arXiv:2210.08823,
    section 3.2; section 3.3 for the merged weight.

        y = g * (W x + b) + t                            (a convolution: g, t by channel)
        W_merged = diag(g) W,  b_merged = g * b + t      (a norm: gain g * gain, bias g * bias + t)

    Shapes:
        g: (width_out,)  ones
        t: (width_out,)  zeros

    Fields:
        target: as in LoRA; "linear" is every linear map in the blocks.
        norms: LayerNorms in the blocks and behind them as well.
        convs: convolutions as well, that of an image's patches among them; not those with a weight made of others.
        shift: whether there is a t. Maps without a bias (Llama, T5) merge without it only.
        layers: as in LN.

    Departures: the paper draws g and t close to one and zero (standard deviation 0.02), so that training starts beside
    the pretrained model; here it starts at it. Left alone: norms before the blocks, norms without a bias (RMSNorm),
    norms by head, norms with an activation or a mask of their own, BatchNorm (the paper's models have none).
    """

    target: str | tuple[str, ...] = "linear"
    norms: bool = True
    convs: bool = True
    shift: bool = True
    layers: Layers = None

    lr: ClassVar[float] = 3e-3
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        names_field("SSF", "target", self.target)
        flag("SSF", "norms", self.norms)
        flag("SSF", "convs", self.convs)
        flag("SSF", "shift", self.shift)
        layers_field("SSF", self.layers)

    def _names(self) -> tuple[str, ...]:
        return as_names(self.target)

    def check(self, sites: Sequence[Site]) -> None:
        # A model of convolutions has no maps in blocks; what the default asks for is there all the same.
        if self._names() != ("linear",) or not any(map(self.acts, sites)):
            check_targets("SSF", "target", self._names(), sites)

    def acts(self, site: Site) -> bool:
        norm = isinstance(site, NormSite) and site.affine and (site.gain, site.bias) == ("weight", "bias")
        conv = isinstance(site, ConvSite)
        wanted = (self.norms and norm and bool(site.roles & {"block", "final"})) or (self.convs and conv)
        return (wanted or targeted(site, self._names())) and in_layers(site, self.layers)

    def init(self, site: OwnerSite) -> dict[str, Tensor]:
        g = {"g": torch.ones(site.width_out)}
        return {**g, "t": torch.zeros(site.width_out)} if self.shift else g

    def may_rest(self, site: Site, term: str) -> bool:
        # A shift of all keys adds the same number to all scores of a query, which softmax ignores.
        return term == "t" and "key" in site.roles

    def after(self, p: Tensors, x: Tensor, y: Tensor, site: OwnerSite) -> Tensor:
        return p["g"] * y + p["t"] if self.shift else p["g"] * y

    def merge(self, p: Tensors, weight: Tensor, bias: Tensor | None, site: OwnerSite) -> tuple[Tensor, Tensor | None]:
        scaled = p["g"].view(-1, *[1] * (weight.ndim - 1)) * weight
        if not self.shift:
            return scaled, None if bias is None else p["g"] * bias
        return scaled, p["t"] if bias is None else p["g"] * bias + p["t"]

    def unmergeable(self, site: OwnerSite) -> str | None:
        if self.shift and site.bias is None:
            return f"{site.name} has no bias to take the shift; shift=False merges"
        return None
