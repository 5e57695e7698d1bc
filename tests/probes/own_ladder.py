"""A method of one's own: a ladder side network of reduced copies of the blocks' maps, beside a frozen base."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smidgen import Method
from smidgen.sites.site import StackSite


@dataclass(frozen=True)
class Ladder(Method[StackSite]):
    """A network beside the base, one narrow block for each of its own.

    Sung, Cho and Bansal 2022, LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning,
    arXiv:2206.06522, section 3.2.

        s_0 = P_0 h_0,  s_i = f_i(g_i s_(i-1) + (1 - g_i) P_i h_i),  f_i(x) = x + O_i gelu(I_i x),  g_i = sigmoid(a_i)
        y = h_L + U s_L

    Shapes:
        P: (blocks + 1, width / reduction, width)
        I, O: (blocks, width / reduction, width / reduction)
        a: (blocks,)
        U: (width, width / reduction), zero at the start

    Initialisation: I and O are every `reduction`-th row and column of the first and the last map of each block.

    Departures: the blocks beside are feed-forward only.
    """

    reduction: int = 4

    def acts(self, site):
        return isinstance(site, StackSite)

    def init(self, site):
        narrow, blocks = site.width // self.reduction, len(site.blocks)
        return {
            "P": torch.randn(blocks + 1, narrow, site.width) / site.width**0.5,
            "I": torch.zeros(blocks, narrow, narrow),
            "O": torch.zeros(blocks, narrow, narrow),
            "a": torch.zeros(blocks),
            "U": torch.zeros(site.width, narrow),
        }

    def from_base(self, p, base, site):
        narrow = p["I"].shape[-1]
        found = {"I": [], "O": []}
        for layer in range(len(site.blocks)):
            maps = [t for n, t in base.items() if n.startswith(f"{layer}.") and t.ndim == 2]
            for symbol, weight in (("I", maps[0]), ("O", maps[-1])):
                found[symbol].append(weight[:: self.reduction, :: self.reduction][:narrow, :narrow])
        return {**p, **{symbol: torch.stack(copies) for symbol, copies in found.items()}}

    def beside(self, p, states, tokens, site):
        s = states[0] @ p["P"][0].T
        for i, h in enumerate(states[1:]):
            g = torch.sigmoid(p["a"][i]).to(s.dtype)
            x = g * s + (1 - g) * (h @ p["P"][i + 1].T)
            s = x + F.gelu(x @ p["I"][i].T) @ p["O"][i].T
        return states[-1] + s @ p["U"].T


def by_hand(p: dict[str, Tensor], states: list[Tensor]) -> Tensor:
    """The formula once more, token by token."""
    found = torch.empty_like(states[-1])
    for b in range(states[0].shape[0]):
        for t in range(states[0].shape[1]):
            s = p["P"][0] @ states[0][b, t]
            for i in range(len(states) - 1):
                g = 1 / (1 + torch.exp(-p["a"][i]))
                x = g * s + (1 - g) * (p["P"][i + 1] @ states[i + 1][b, t])
                s = x + p["O"][i] @ F.gelu(p["I"][i] @ x)
            found[b, t] = states[-1][b, t] + p["U"] @ s
    return found
