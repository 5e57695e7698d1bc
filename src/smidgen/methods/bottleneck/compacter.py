"""Compacter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from smidgen.common.errors import PlanError, RecipeError
from smidgen.methods.base import Method, Tensors
from smidgen.methods.field_checks import at_least, layers_field, names_field, one_of
from smidgen.methods.functional import ACTIVATIONS, glorot, kronecker_sum
from smidgen.sites.site import Site, Sublayer
from smidgen.sites.sublayers import SUBLAYERS, check_sublayers
from smidgen.sites.targeting import Layers, as_names, in_layers


@dataclass(frozen=True)
class Compacter(Method[Sublayer]):
    """Add bottlenecks made of Kronecker products whose outer factors all sites share.

    Karimi Mahabadi et al. 2021, Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, arXiv:2106.04647,
    section 3.3. Compacter++ is site="feed_forward"; both train the norms as well: add LN().

        y = f + act(f D + d) U + u          f leaves the sublayer, before residual and norm
        D = sum_i S_i x (s_i t_i)           x is the Kronecker product, s_i t_i a matrix of the given rank
        U = sum_i S_i x (v_i w_i)

    Shapes:
        S: (blocks, blocks, blocks)  once for all sites, for D and for U; normal, standard deviation 0.01
        s: (blocks, width_out/blocks, rank)  uniform (Glorot, gain sqrt(2))
        t: (blocks, rank, width/blocks)  as s
        d: (width,)  zeros
        v: (blocks, width/blocks, rank)  as s
        w: (blocks, rank, width_out/blocks)  zeros
        u: (width_out,)  zeros

    Fields:
        width: of the bottleneck, a multiple of blocks.
        blocks: the number n of Kronecker products; it divides the model's width as well.
        rank: of each factor that a site has of its own.
        site, activation, layers: as in Adapter; "gelu_tanh" is the authors'.

    Departures: the paper draws w as it draws s, and its runs S with a standard deviation of 1e-4, so that the start is
    nearly the identity; here w is zero, so the start is the identity, and S is wider, because what reaches w passes S
    twice.
    """

    width: int = 24
    blocks: int = 4
    rank: int = 1
    site: str | tuple[str, ...] = ("attention", "feed_forward")
    activation: str = "gelu_tanh"
    layers: Layers = None

    lr: ClassVar[float] = 1e-2

    def __post_init__(self) -> None:
        for name in ("width", "blocks", "rank"):
            at_least("Compacter", name, getattr(self, name), 1)
        names_field("Compacter", "site", self.site)
        for name in self._sites():
            one_of("Compacter", "site", name, SUBLAYERS)
        one_of("Compacter", "activation", self.activation, tuple(ACTIVATIONS))
        layers_field("Compacter", self.layers)
        if self.width % self.blocks:
            raise RecipeError(f"Compacter: blocks={self.blocks} does not divide width={self.width}")

    def _sites(self) -> tuple[str, ...]:
        return as_names(self.site)

    def check(self, sites: Sequence[Site]) -> None:
        check_sublayers("Compacter", self._sites(), sites)

    def acts(self, site: Site) -> bool:
        return isinstance(site, Sublayer) and site.kind in self._sites() and in_layers(site, self.layers)

    def shared(self, sites: Sequence[Sublayer]) -> dict[str, Tensor]:
        return {"S": 0.01 * torch.randn(self.blocks, self.blocks, self.blocks)}

    def init(self, site: Sublayer) -> dict[str, Tensor]:
        n, r, width = self.blocks, self.rank, site.width_out
        if width % n:
            raise PlanError(f"Compacter: blocks={n} does not divide the width of {site.name}, {width}")
        if r > min(width, self.width) // n:
            most = min(width, self.width) // n
            raise PlanError(f"Compacter: rank={r} is above the smaller side of its factors; at most {most} works")
        gain = math.sqrt(2)
        return {
            "s": glorot(n, width // n, r, gain=gain),
            "t": glorot(n, r, self.width // n, gain=gain),
            "d": torch.zeros(self.width),
            "v": glorot(n, self.width // n, r, gain=gain),
            "w": torch.zeros(n, r, width // n),
            "u": torch.zeros(width),
        }

    def may_rest(self, site: Site, term: str) -> bool:
        # A ReLU that is off for all tokens of a batch passes no gradient to its bias.
        return self.activation == "relu" and term == "d"

    def reads_entry(self, site: Site) -> bool:
        return False

    def after(self, p: Tensors, x: Tensor, y: Tensor, site: Sublayer) -> Tensor:
        D = kronecker_sum(p["S"], p["s"] @ p["t"])  # (width_out, width)
        U = kronecker_sum(p["S"], p["v"] @ p["w"])  # (width, width_out)
        hidden = ACTIVATIONS[self.activation](F.linear(y, D.T, p["d"].to(y.dtype)))
        return y + F.linear(hidden, U.T, p["u"].to(y.dtype))

    def unmergeable(self, site: Sublayer) -> str | None:
        return "a bottleneck with a nonlinearity behind a sublayer is no weight of it"
