"""IA3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smidgen.common.errors import PlanError
from smidgen.methods.base import Method, Tensors
from smidgen.methods.field_checks import layers_field, names_field
from smidgen.sites.site import LinearSite, Site
from smidgen.sites.targeting import Layers, as_names, check_targets, in_layers, targeted

TARGET, INPUTS = ("key", "value", "ff_out"), "ff_out"


@dataclass(frozen=True)
class IA3(Method[LinearSite]):
    """Rescale keys, values and the inner activations of the feed-forward network.

    Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning,
    arXiv:2205.05638, section 3.3.

        key, value:    y = l * (W x + b)         W_merged = diag(l) W,  b_merged = l * b
        feed-forward:  y = W (l * x) + b         W_merged = W diag(l)

    Shapes:
        l: (width_out,) at keys and values, (width_in,) at the second feed-forward map; ones

    Fields:
        layers: as in LN.
        target: as in LoRA; which maps.
        inputs: which of them have their input scaled, as the second feed-forward map has, instead of their output.

    Departures: none. In a gated feed-forward network l scales the gated product, as in the authors' T0 models.
    """

    layers: Layers = None
    target: str | tuple[str, ...] = TARGET
    inputs: str | tuple[str, ...] = INPUTS

    lr: ClassVar[float] = 3e-2
    linear: ClassVar[bool] = True
    later: ClassVar[dict[str, object]] = {"target": TARGET, "inputs": INPUTS}

    def __post_init__(self) -> None:
        layers_field("IA3", self.layers)
        names_field("IA3", "target", self.target)
        names_field("IA3", "inputs", self.inputs, least=0)

    def check(self, sites: Sequence[Site]) -> None:
        # Of the default's places a model may lack some.
        for field, names, usual in (("target", self.target, TARGET), ("inputs", self.inputs, (INPUTS,))):
            check_targets("IA3", field, [name for name in as_names(names) if name not in usual], sites)
        for site in filter(self.enters, sites):
            if site.part and self.acts(site):
                raise PlanError(
                    f"IA3: inputs names {site.name}, a slice of a fused map whose slices share one input; scale its "
                    "output, or name the whole map"
                )

    def acts(self, site: Site) -> bool:
        return targeted(site, as_names(self.target)) and in_layers(site, self.layers)

    def enters(self, site: Site) -> bool:
        return targeted(site, as_names(self.inputs))

    def init(self, site: LinearSite) -> dict[str, Tensor]:
        return {"l": torch.ones(site.width_in if self.enters(site) else site.width_out)}

    def before(self, p: Tensors, x: Tensor, site: LinearSite) -> Tensor:
        return p["l"] * x if self.enters(site) else x

    def after(self, p: Tensors, x: Tensor, y: Tensor, site: LinearSite) -> Tensor:
        return y if self.enters(site) else p["l"] * y

    def merge(self, p: Tensors, weight: Tensor, bias: Tensor | None, site: LinearSite) -> tuple[Tensor, Tensor | None]:
        if self.enters(site):
            return weight * p["l"], bias
        return p["l"][:, None] * weight, None if bias is None else p["l"] * bias
