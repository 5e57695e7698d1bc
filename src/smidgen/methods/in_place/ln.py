"""LN-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from smidgen.methods.base import Method
from smidgen.methods.field_checks import layers_field, one_of
from smidgen.sites.site import NormSite, Site
from smidgen.sites.targeting import Layers, in_layers

WHICH = ("all", "attention", "output", "embedding", "final", "qk", "block")


@dataclass(frozen=True)
class LN(Method):
    """Train the gains and biases of the normalisation layers, nothing else.

    Qi et al. 2022, Parameter-Efficient Tuning on Layer Normalization, arXiv:2211.08682, section 3.
    ValizadehAslani and Liang 2024, LayerNorm as the key component, arXiv:2403.20284 (which part, and how much).

        LayerNorm:  y = g * (x - mean(x)) / sqrt(var(x) + eps) + b
        RMSNorm:    y = g * x / sqrt(mean(x^2) + eps)              (Gemma: 1 + g instead of g)

    Shapes:
        g: (width,)  starts at the pretrained gain
        b: (width,)  starts at the pretrained bias, where the norm has one

    Fields:
        which: "all", "attention" (norm of the attention sublayer), "output" (of the feed-forward sublayer),
            "embedding", "final", "qk" (of queries and keys) or "block" (all inside the blocks).
        terms: "both", "gain" or "bias".
        layers: None for all, or "top:2", "bottom:2", "2:5", 3, (0, 5): blocks of each stack, counted from its input.
            Norms outside the blocks (embedding, final) are left out when `layers` is given.

    Departures: the papers treat BERT and GPT-2; here RMSNorm, Gemma's (1 + g), q/k norms and GroupNorm count too.
    BatchNorm does not: it has running statistics, which stand still while something is attached.
    """

    which: str = "all"
    terms: str = "both"
    layers: Layers = None

    lr: ClassVar[float] = 3e-3

    def __post_init__(self) -> None:
        one_of("LN", "which", self.which, WHICH)
        one_of("LN", "terms", self.terms, ("both", "gain", "bias"))
        layers_field("LN", self.layers)

    def trains(self, site: Site) -> tuple[str, ...]:
        if not isinstance(site, NormSite) or (self.which != "all" and self.which not in site.roles):
            return ()
        if not in_layers(site, self.layers):
            return ()
        gain = site.gain if self.terms != "bias" else None
        bias = site.bias if self.terms != "gain" else None
        return tuple(term for term in (gain, bias) if term is not None)
