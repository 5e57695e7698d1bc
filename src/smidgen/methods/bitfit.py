"""BitFit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from smidgen.fields import Layers, flag, in_layers, layers_field
from smidgen.method import Method
from smidgen.sites import Site


@dataclass(frozen=True)
class BitFit(Method):
    """Train every bias of the pretrained model, nothing else.

    Ben-Zaken et al. 2022, BitFit, arXiv:2106.10199, section 3.

        y = W x + b          b trained, W frozen

    Shapes:
        b: (width_out,)  starts at the pretrained bias

    Fields:
        norms: count the biases of norms as well, as the paper does.
        layers: as in LN; biases outside the blocks (embedding norm, pooler) are left out when it is given.

    Departures: none for models with biases. A model without any (Llama, T5) is refused; no bias is created.
    """

    norms: bool = True
    layers: Layers = None

    lr: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        flag("BitFit", "norms", self.norms)
        layers_field("BitFit", self.layers)

    def trains(self, site: Site) -> tuple[str, ...]:
        wanted = site.bias is not None and site.rows is None and (self.norms or site.kind != "norm")
        return (site.bias,) if wanted and site.bias and in_layers(site, self.layers) else ()

    def may_rest(self, site: Site, term: str) -> bool:
        # A key bias adds the same number to all scores of a query, which softmax ignores: its gradient is zero.
        return "key" in site.roles
