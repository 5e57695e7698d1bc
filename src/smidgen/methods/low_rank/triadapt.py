"""TriAdaptLoRA."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from smidgen.common.errors import RecipeError
from smidgen.methods.base import Tensors
from smidgen.methods.field_checks import above, at_least, share_field
from smidgen.methods.low_rank.base import LowRank, MapLike

SPREAD = 0.02


@dataclass(frozen=True)
class TriAdaptLoRA(LowRank):
    """LoRA whose rank grows in training where its core gains most.

    Liang et al. 2025, TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation, arXiv:2501.08008,
    section 3.

        C = lower(L) + upper(U)             block triangular, both with the diagonal blocks
        y = W x + b + s * B C A dropout(x)  s = alpha / rank
        W_merged = W + s * B C A
        growth of a map with rank r by a:   A gains a rows, B a columns, L a block (a, r + a), U a block (r + a, a)

    After the first `begin` of all steps, every `every` of them, while the ranks of all n maps add up to less than
    n * rank: the k maps whose score |C|_F / blocks has risen most since the last event grow, with
    k = (n * rank - sum of ranks) * t and t how much of the time after `begin` is over, at least one, at most all.

    Shapes:
        A: (start, width_in)   normal, standard deviation 0.02
        B: (width_out, start)  zeros
        L: (start*start,)      as A; block after block
        U: (start*start,)      as A; in a later block zeros, as the columns that B gains: growth changes no output

    Fields:
        rank: to which a map grows on average.
        start, growth: rank at first, and by how much it grows; growth=None means half of rank.
        begin, every: shares of the training steps.
        orthogonality: strength of mean(|A A^T - I|_F, |B^T B - I|_F), added to the loss.
        alpha, target, exclude, layers, dropout: as in LoRA.

    Departures: the paper's B, L and U all start at zero in the published file, where no gradient reaches anything. s
    keeps to the final rank, so that growth does not rescale what was learned. Exactly k maps grow also when scores are
    equal, and no more than the total still takes; the last events may exceed it by less than growth. The penalty, 0.5
    in the published file, is off by default.
    """

    start: int = 1
    growth: int | None = None
    begin: float = 0.1
    every: float = 0.05
    orthogonality: float = 0.0

    lr: ClassVar[float] = 3e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("TriAdaptLoRA", "start", self.start, 1)
        if self.growth is not None:
            at_least("TriAdaptLoRA", "growth", self.growth, 1)
        at_least("TriAdaptLoRA", "orthogonality", self.orthogonality, 0, float)
        share_field("TriAdaptLoRA", "begin", self.begin)
        above("TriAdaptLoRA", "every", self.every, 0)
        if self.start > self.rank:
            raise RecipeError(f"TriAdaptLoRA: start={self.start} is above rank={self.rank}, to which maps grow")
        if self.every > 1:
            raise RecipeError(f"TriAdaptLoRA: every={self.every!r} is a share of the steps: above 0, at most 1")

    @property
    def step(self) -> int:
        """By how much a rank grows."""
        return max(1, self.rank // 2) if self.growth is None else self.growth

    def init(self, site: MapLike) -> dict[str, Tensor]:
        self.check_rank(site)
        r = self.start
        drawn = {"A": (r, site.width_in), "L": (r * r,), "U": (r * r,)}
        return {"B": torch.zeros(site.width_out, r)} | {k: SPREAD * torch.randn(shape) for k, shape in drawn.items()}

    def blocks(self, rank: int) -> Iterator[tuple[int, int]]:
        """Size of each growth, and the rank behind it."""
        for total in range(self.start, rank + 1, self.step):
            yield (self.start if total == self.start else self.step), total

    def core(self, p: Tensors) -> Tensor:
        """C (r, r)."""
        r, at = len(p["A"]), 0
        rows, columns = [], []
        for a, s in self.blocks(r):
            rows.append(F.pad(p["L"][at : at + a * s].view(a, s), (0, r - s)))
            columns.append(F.pad(p["U"][at : at + a * s].view(s, a), (0, 0, 0, r - s)))
            at += a * s
        return torch.cat(rows) + torch.cat(columns, 1)

    def after(self, p: Tensors, x: Tensor, y: Tensor, site: MapLike) -> Tensor:
        inner = F.linear(F.linear(x, p["A"]), self.core(p).to(x.dtype))  # (..., r)
        return y + self.scale * F.linear(inner, p["B"])

    def merge(self, p: Tensors, weight: Tensor, bias: Tensor | None, site: MapLike) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * (p["B"] @ self.core(p) @ p["A"]), bias

    def penalty(self, parts: Sequence[Tensors], sites: Sequence[MapLike]) -> Tensor | None:
        if not self.orthogonality:
            return None
        found = [_skew(p["A"]) for p in parts] + [_skew(p["B"].T) for p in parts]
        return self.orthogonality * torch.stack(found).mean()

    def due(self, step: int, total: int) -> bool:
        begin, every = round(self.begin * total), max(1, round(self.every * total))
        return begin < step < total and (step - begin) % every == 0

    def event(
        self, step: int, total: int, sites: Sequence[MapLike], parts: Sequence[Tensors], memory: Tensors
    ) -> tuple[Sequence[Tensors], Tensors]:
        scores = torch.stack([self.core(p).norm() / len(list(self.blocks(len(p["A"])))) for p in parts])
        gained = (scores - memory["scores"] if memory else scores).tolist()
        most = [min(site.width_in, site.width_out) for site in sites]
        able = [i for i, p in enumerate(parts) if len(p["A"]) + self.step <= most[i]]
        ranked = sorted(able, key=lambda i: -gained[i])[: self.count(step, total, [len(p["A"]) for p in parts])]
        return [self.larger(p) if i in ranked else p for i, p in enumerate(parts)], {"scores": scores}

    def count(self, step: int, total: int, ranks: Sequence[int]) -> int:
        """How many maps grow."""
        left = len(ranks) * self.rank - sum(ranks)
        over = (step / total - self.begin) / (1 - self.begin)
        return max(0, min(max(1, int(left * over)), math.ceil(left / self.step), len(ranks)))

    def larger(self, p: Tensors) -> Tensors:
        """The tensors that do the same with a larger rank."""
        A, B, a = p["A"], p["B"], self.step
        block = a * (len(A) + a)
        return {
            "A": torch.cat((A, SPREAD * torch.randn(a, A.shape[1]).to(A))),
            "B": torch.cat((B, B.new_zeros(len(B), a)), 1),
            "L": torch.cat((p["L"], SPREAD * torch.randn(block).to(A))),
            "U": torch.cat((p["U"], A.new_zeros(block))),
        }

    def grown(self, shapes: Mapping[str, tuple[int, ...]], site: MapLike) -> bool:
        r = shapes["A"][0]
        core = sum(a * s for a, s in self.blocks(r))
        wanted = {"A": (r, site.width_in), "B": (site.width_out, r), "L": (core,), "U": (core,)}
        return dict(shapes) == wanted and (r - self.start) % self.step == 0 and r >= self.start


def _skew(rows: Tensor) -> Tensor:
    """|X X^T - I|_F of X (r, width)."""
    return (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).norm()
