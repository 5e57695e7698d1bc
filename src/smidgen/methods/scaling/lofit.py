"""LoFiT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from smidgen.methods.base import Method, Tensors
from smidgen.methods.field_checks import at_least, layers_field, one_of
from smidgen.sites.site import LinearSite, Site
from smidgen.sites.targeting import Layers, in_layers


@dataclass(frozen=True)
class LoFiT(Method[LinearSite]):
    """Add an offset to what attention heads give, best to a few heads that a first phase chose.

    Yin et al. 2024, LoFiT: Localized Fine-tuning on LLM Representations, arXiv:2406.01563, section 3.

        z = the heads' outputs side by side, which enter the output map W_O
        form="offset":  W_O (z + v) + b                 second phase, on the chosen heads
        form="gain":    W_O ((1 + A) * z) + b           first phase, on all heads, with l1 * sum|A| added to the loss
        b_merged = b + W_O v        W_merged = W_O diag(1 + A)

    Both phases: `LoFiT() | Select("scout", keep=16, granularity="head", warmup=200)` trains the gains for 200 steps,
    drops them, and trains the offsets of the 16 heads with the largest |A|.

    Shapes:
        v: (width_in,)  zeros; the heads' own parts one after the other
        A: (width_in,)  zeros

    Fields:
        form: "offset" or "gain".
        l1: of the gains.
        layers: as in LN.

    Departures: v and A start at zero (the identity), in the paper at a normal distribution of deviation 0.001.
    """

    form: str = "offset"
    l1: float = 5e-4
    layers: Layers = None

    lr: ClassVar[float] = 1e-2
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of("LoFiT", "form", self.form, ("offset", "gain"))
        at_least("LoFiT", "l1", self.l1, 0, float)
        layers_field("LoFiT", self.layers)

    def acts(self, site: Site) -> bool:
        return isinstance(site, LinearSite) and "attention_out" in site.roles and in_layers(site, self.layers)

    def init(self, site: LinearSite) -> dict[str, Tensor]:
        return {"v" if self.form == "offset" else "A": torch.zeros(site.width_in)}

    def before(self, p: Tensors, x: Tensor, site: LinearSite) -> Tensor:
        return x + p["v"] if self.form == "offset" else (1 + p["A"]) * x

    def merge(self, p: Tensors, weight: Tensor, bias: Tensor | None, site: LinearSite) -> tuple[Tensor, Tensor | None]:
        if self.form == "gain":
            return weight * (1 + p["A"]), bias
        return weight, weight @ p["v"] if bias is None else bias + weight @ p["v"]

    def unmergeable(self, site: LinearSite) -> str | None:
        lacking = self.form == "offset" and "bias" not in dict(site.terms)
        return "an offset becomes a bias of the output map, which has none here" if lacking else None

    def penalty(self, parts: Sequence[Tensors], sites: Sequence[LinearSite]) -> Tensor | None:
        if self.form == "offset" or not self.l1:
            return None
        return self.l1 * torch.stack([p["A"].abs().sum() for p in parts]).sum()

    def scout(self) -> Method | None:
        return replace(self, form="gain") if self.form == "offset" else None
