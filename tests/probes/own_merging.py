"""A method of one's own: pairs of neighbouring tokens become one behind a block, and go on at half the length."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from smidgen import Method
from smidgen.sites.site import BlockSite


@dataclass(frozen=True)
class PairMerging(Method[BlockSite]):
    """Merge each token with its neighbour behind one block, as weighted mean.

    After Bolya et al. 2023, Token Merging: Your ViT But Faster, arXiv:2210.09461, section 3.

        x'_j = (w_j x_2j + (1 - w_j) x_(2j+1)),  w = sigmoid(v . x_2j)

    Shapes:
        v: (width,)

    Initialisation: zero, the plain mean.

    Departures: neighbours in place of the most alike; the first token stays alone. Padding has no weight.
    """

    layer: int = 1

    def acts(self, site):
        return isinstance(site, BlockSite) and site.layer == self.layer

    def init(self, site):
        return {"v": torch.zeros(site.width)}

    def shorten(self, p, x, tokens, site):
        order = torch.arange(x.shape[1], device=x.device)
        places = (order + 1) // 2  # 0 | 1 1 | 2 2 | ...
        w = torch.sigmoid(x @ p["v"].to(x.dtype))
        share = torch.where(order % 2 == 1, w, torch.where(order > 0, 1 - w.roll(1, 1), 1.0))
        if tokens.text is not None:
            share = share * tokens.text
        shorter = x.new_zeros(len(x), int(places[-1]) + 1, x.shape[-1])
        total = shorter[..., 0].index_add(1, places, share).clamp(min=1e-6)
        merged = shorter.index_add(1, places, x * share[..., None]) / total[..., None]
        return merged, places.expand(len(x), -1)
