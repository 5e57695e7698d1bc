"""BitFit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from smidgen.methods.base import Method
from smidgen.methods.field_checks import flag, layers_field
from smidgen.sites.site import NormSite, OwnerSite, Site
from smidgen.sites.targeting import Layers, in_layers


@dataclass(frozen=True)
class BitFit(Method):
    """Train every bias of the pretrained model, nothing else.

    Ben-Zaken et al. 2022, BitFit, arXiv:2106.10199, section 3.

        y = W x + b          b trained, W frozen

    Shapes:
        b: (width_out,), or as the model has it; starts at the pretrained bias

    Fields:
        norms: count the biases of norms as well, as the paper does.
        layers: as in LN; biases outside the blocks (embedding norm, pooler) are left out when it is given.
        beside: count biases that a module has beside its maps as well: DeBERTa's q_bias and v_bias, XLNet's r_w_bias,
            those of stacked experts (gate_up_proj_bias). Not tables of biases by distance (T5, Swin), nor what a router
            adds to choose experts, which the loss does not see.

    Departures: none for models with biases. A model without any (Llama, T5) is refused; no bias is created.
    """

    norms: bool = True
    layers: Layers = None
    beside: bool = True

    lr: ClassVar[float] = 3e-3
    later: ClassVar[Mapping[str, object]] = {"beside": False}

    def __post_init__(self) -> None:
        flag("BitFit", "norms", self.norms)
        flag("BitFit", "beside", self.beside)
        layers_field("BitFit", self.layers)

    def trains(self, site: Site) -> tuple[str, ...]:
        wanted = not site.part and (self.norms or not isinstance(site, NormSite)) and in_layers(site, self.layers)
        if not wanted or not isinstance(site, OwnerSite):
            return ()
        return tuple(term for term in site.biases if self.beside or term == site.bias)

    def may_idle(self, site: Site, term: str) -> bool:
        # It trains every bias there is, also of what a task never uses: a pooler, what Longformer adds for global
        # attention, XLNet for segments.
        return True

    def may_rest(self, site: Site, term: str) -> bool:
        # A key bias adds the same number to all scores of a query, which softmax ignores: its gradient is zero.
        return "key" in site.roles
