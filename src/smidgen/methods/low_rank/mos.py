"""MoS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from smidgen.common.errors import PlanError, RecipeError
from smidgen.methods.base import Tensors
from smidgen.methods.field_checks import at_least
from smidgen.methods.low_rank.base import LowRank, MapLike
from smidgen.sites.targeting import LINEAR_ROLES


@dataclass(frozen=True)
class MoS(LowRank):
    """Build the two matrices of LoRA from shards of pools that all layers share.

    Wang et al. 2024, MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards,
    arXiv:2410.00938, section 3.

        A = P[I].reshape(rank, width_in)    B = Q[J].reshape(rank, width_out)^T    s = alpha / rank
        y = W x + b + s * B A dropout(x)
        W_merged = W + s * B A

    Maps of one role and one shape share the pools P and Q, as large as LoRAs of rank `equivalent` at each of them.
    I and J are drawn apart, once: `rank - private` rows' shards from the public part without repetition, and the
    shards that no other map uses.

    Shapes:
        P: (equivalent*sites*shards, width_in/shards)   uniform in +-1/sqrt(width_in)
        Q: (equivalent*sites*shards, width_out/shards)  zeros
        I: (rank*shards,)  whole numbers, not trained
        J: (rank*shards,)  as I

    Fields:
        rank: of each map's change.
        equivalent: trained values as LoRA of this rank has them.
        shards: pieces of a row.
        private: rows of a map that it shares with no other.
        alpha, target, exclude, layers, dropout: as in LoRA.

    Departures: Q's shards are columns of B, so P and Q are laid out alike; the authors' scaling vectors, which they pin
    to 1, are left out.
    """

    rank: int = 4
    equivalent: int = 2
    shards: int = 4
    private: int = 1

    lr: ClassVar[float] = 3e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("equivalent", 1), ("shards", 1), ("private", 0)):
            at_least("MoS", name, getattr(self, name), least)
        if self.private > min(self.equivalent, self.rank):
            least = min(self.equivalent, self.rank)
            raise RecipeError(f"MoS: private={self.private} is above rank or equivalent; at most {least} works")
        if self.private == self.equivalent != self.rank:
            raise RecipeError(
                f"MoS: private={self.private} leaves nothing to share of equivalent={self.equivalent}, so rank must be "
                f"{self.equivalent}, not {self.rank}"
            )

    def group(self, site: MapLike) -> str:
        role = next((role for role in LINEAR_ROLES if role in site.roles), site.path.rpartition(".")[2])
        return f"{role}-{site.width_out}x{site.width_in}"

    def shared(self, sites: Sequence[MapLike]) -> dict[str, Tensor]:
        site, n = sites[0], self.equivalent * len(sites) * self.shards
        for width in (site.width_in, site.width_out):
            if width % self.shards:
                raise PlanError(f"MoS: shards={self.shards} does not divide the width {width} of {site.name}")
        if self.rank - self.private > (self.equivalent - self.private) * len(sites):
            most = (self.equivalent - self.private) * len(sites) + self.private
            raise PlanError(
                f"MoS: rank={self.rank} needs more than the pool of {len(sites)} maps; at most {most} works"
            )
        bound = 1 / math.sqrt(site.width_in)
        P = torch.empty(n, site.width_in // self.shards).uniform_(-bound, bound)
        return {"P": P, "Q": torch.zeros(n, site.width_out // self.shards)}

    def shared_indices(self, site: MapLike, sites: Sequence[MapLike]) -> dict[str, Tensor]:
        public = (self.equivalent - self.private) * len(sites) * self.shards
        own = self.private * self.shards
        first = public + [other.name for other in sites].index(site.name) * own
        private = torch.arange(first, first + own)
        drawn = (self.rank - self.private) * self.shards
        return {symbol: torch.cat((torch.randperm(public)[:drawn], private)) for symbol in ("I", "J")}

    def _factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """A (rank, width_in) and B^T (rank, width_out)."""
        return p["P"][p["I"]].reshape(self.rank, -1), p["Q"][p["J"]].reshape(self.rank, -1)

    def after(self, p: Tensors, x: Tensor, y: Tensor, site: MapLike) -> Tensor:
        A, Bt = self._factors(p)
        return y + self.scale * F.linear(F.linear(x, A), Bt.T)  # (..., width_out)

    def merge(self, p: Tensors, weight: Tensor, bias: Tensor | None, site: MapLike) -> tuple[Tensor, Tensor | None]:
        A, Bt = self._factors(p)
        return weight + self.scale * (Bt.T @ A), bias
