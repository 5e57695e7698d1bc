"""Adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from smidgen.methods.base import Method, Tensors
from smidgen.methods.field_checks import above, at_least, layers_field, names_field, one_of
from smidgen.methods.functional import ACTIVATIONS, fan_in_uniform
from smidgen.sites.site import Site, Sublayer
from smidgen.sites.sublayers import SUBLAYERS, check_sublayers
from smidgen.sites.targeting import Layers, as_names, in_layers


@dataclass(frozen=True)
class Adapter(Method[Sublayer]):
    """Add a bottleneck with a nonlinearity to the sublayers of a block.

    Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP, arXiv:1902.00751, section 2.1 (after both
    sublayers).
    Pfeiffer et al. 2020, AdapterFusion, arXiv:2005.00247, section 3.2.1 (site="feed_forward").
    He et al. 2021, Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv:2110.04366, section 3.3
    (form="parallel"; scaled parallel: scale=4).

        sequential:  y = f + s * (U act(D f + d) + u)
        parallel:    y = f + s * (U act(D x + d) + u)      x enters the sublayer, f leaves it, before residual and norm

    Shapes:
        D: (width, width_in) in parallel, (width, width_out) in sequence; uniform in +-1/sqrt(columns)
        d: (width,)  zeros
        U: (width_out, width)  zeros
        u: (width_out,)  zeros

    Fields:
        site: "attention", "feed_forward", "cross_attention", or several of them.
        width: of the bottleneck.
        form: "sequential" or "parallel".
        scale: s.
        activation: "gelu_tanh" (Houlsby: the tanh form), "relu" (Pfeiffer, He), "gelu", "silu", "tanh" or "identity".
        layers: as in LN.

    Departures: Houlsby draws both matrices from a narrow normal distribution (near identity), here U is zero as in He
    et al. (identity). Houlsby trains the norms as well: add LN(). Pfeiffer's adapter reads LN(f + x), with the block's
    own frozen norm, and adds to f; here D reads f. The adapter acts before the dropout of the sublayer's output.
    """

    site: str | tuple[str, ...] = ("attention", "feed_forward")
    width: int = 64
    form: str = "sequential"
    scale: float = 1.0
    activation: str = "gelu"
    layers: Layers = None

    lr: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        names_field("Adapter", "site", self.site)
        for name in self._sites():
            one_of("Adapter", "site", name, SUBLAYERS)
        one_of("Adapter", "form", self.form, ("sequential", "parallel"))
        one_of("Adapter", "activation", self.activation, tuple(ACTIVATIONS))
        at_least("Adapter", "width", self.width, 1)
        layers_field("Adapter", self.layers)
        above("Adapter", "scale", self.scale, 0)

    def _sites(self) -> tuple[str, ...]:
        return as_names(self.site)

    def check(self, sites: Sequence[Site]) -> None:
        check_sublayers("Adapter", self._sites(), sites)

    def acts(self, site: Site) -> bool:
        return isinstance(site, Sublayer) and site.kind in self._sites() and in_layers(site, self.layers)

    def init(self, site: Sublayer) -> dict[str, Tensor]:
        columns = site.width_in if self.form == "parallel" else site.width_out
        D = fan_in_uniform(self.width, columns)
        U = torch.zeros(site.width_out, self.width)
        return {"D": D, "d": torch.zeros(self.width), "U": U, "u": torch.zeros(site.width_out)}

    def may_rest(self, site: Site, term: str) -> bool:
        # A ReLU that is off for all tokens of a batch passes no gradient to its bias.
        return self.activation == "relu" and term == "d"

    def reads_entry(self, site: Site) -> bool:
        return self.form == "parallel"

    def after(self, p: Tensors, x: Tensor, y: Tensor, site: Sublayer) -> Tensor:
        x = x if self.form == "parallel" else y
        hidden = ACTIVATIONS[self.activation](F.linear(x, p["D"], p["d"].to(x.dtype)))  # (..., width)
        return y + self.scale * F.linear(hidden, p["U"], p["u"].to(x.dtype))

    def unmergeable(self, site: Sublayer) -> str | None:
        return "a bottleneck with a nonlinearity beside a sublayer is no weight of it"
