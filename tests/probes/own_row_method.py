"""A method of one's own that rows of one batch can have different tensors of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from smidgen import Method
from smidgen.sites.site import LinearSite


@dataclass(frozen=True)
class Swivel(Method[LinearSite]):
    """Turn the output of a query map by a learned rank-one step.

    y + u (v . x)

    Shapes:
        u: (width_out,)
        v: (width_in,)

    Initialisation: u zero, v normal.
    """

    def acts(self, site):
        return isinstance(site, LinearSite) and "query" in site.roles

    def init(self, site):
        return {"u": torch.zeros(site.width_out), "v": torch.randn(site.width_in)}

    def after(self, p, x, y, site):
        return y + (x @ p["v"].to(x.dtype))[..., None] * p["u"]
