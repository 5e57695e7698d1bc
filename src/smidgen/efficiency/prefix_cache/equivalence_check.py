"""Whether a lower part can be kept at all: told from a few examples, before the others are computed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from smidgen.common.errors import TrainError
from smidgen.data.kinds.base import Collate
from smidgen.efficiency.prefix_cache.cut_point import Cut
from smidgen.efficiency.prefix_cache.recorded_pass import Batch, Trace, states_at, trace
from smidgen.efficiency.prefix_cache.resume_forward import Seam
from smidgen.efficiency.prefix_cache.token_layout import Rows, kept_of, lengths_of, pads_left

# By how much of its scale a number may differ when computed in another batch; rotary angles are float32 at most.
ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_FEW, _READ = 4, 16


@dataclass(frozen=True, eq=False)
class EquivalenceCheck:
    """A few examples in one batch, computed whole.

    Attributes:
        lengths: tokens of every example of the split.
        places: numbers of the few.
        kept: (b, T) bool, where the batch holds tokens.
        allowed: difference that is rounding, relative to scale.
    """

    lengths: list[int]
    places: list[int]
    batch: Batch
    kept: Tensor
    left: bool
    seen: Trace
    seam: Seam
    allowed: float

    @classmethod
    def of(cls, cut: Cut, rows: Rows, collate: Collate) -> EquivalenceCheck:
        """Run a few examples of a split, the shortest and the longest among them.

        Raises:
            TrainError: they differ from one reading to the next, or their states do from one forward pass or one
                padding to the next.
        """
        known = lengths_of(rows)
        counts = known or [1] * len(rows)
        _read_twice(cut, rows, collate, _few(counts, _READ))
        places = _few(counts, _FEW)
        batch = batch_of(cut.model, rows, collate, places)
        seen = trace(cut, batch)
        lengths = known or [seen.states.shape[1]] * len(rows)
        kept = kept_of(cut, batch, tuple(seen.states.shape), [lengths[i] for i in places])
        seam, left = Seam.of(cut, seen), pads_left(cut, kept)
        limit = allowed(seen.precision, seen.states.device.type)
        found = cls(lengths, places, batch, kept, left, replace(seen, calls=[]), seam, limit)
        found._check_again(cut)
        found._check_alone(cut, rows, collate)
        return found

    def check_states(self, cut: Cut, cached: Tensor) -> None:
        """Compare kept states (b, T, d) of the few with their own. Raises TrainError if they are others."""
        self._same_states(cut, cached[self.kept], self.seen.states.cpu()[self.kept], "kept and fresh hidden states")

    def check_result(self, cut: Cut, result: Tensor, loss: Tensor | None) -> None:
        """Compare logits and loss of the few with their own. Raises TrainError if they are others."""
        wanted, found = self.seen.result, result
        if wanted.ndim == 3 and wanted.shape[:2] == self.kept.shape:  # at padding they mean nothing
            wanted, found = wanted.cpu()[self.kept], found.cpu()[self.kept]
        off = gap(found[None], wanted[None]) if found.shape == wanted.shape else float("inf")
        self._small(cut, off, "logits with and without the cache")
        if loss is not None and self.seen.loss is not None:
            off = float((loss - self.seen.loss).abs() / self.seen.loss.abs().clamp_min(1))
            self._small(cut, off, "losses with and without the cache (does one depend on padding?)")

    def _check_again(self, cut: Cut) -> None:
        again = states_at(cut, self.batch).cpu()[self.kept]
        self._same_states(cut, again, self.seen.states.cpu()[self.kept], "they are random in eval mode: two runs")

    def _check_alone(self, cut: Cut, rows: Rows, collate: Collate) -> None:
        """The shortest example, which has the most padding among the others, without them."""
        i = min(range(len(self.places)), key=lambda k: self.lengths[self.places[k]])
        place = self.places[i]
        batch = batch_of(cut.model, rows, collate, [place])
        states = states_at(cut, batch)
        kept = kept_of(cut, batch, tuple(states.shape), [self.lengths[place]])
        wanted = self.seen.states[i].cpu()[self.kept[i]]
        self._same_states(cut, states.cpu()[kept], wanted, "they depend on padding: alone and beside longer ones they")

    def _same_states(self, cut: Cut, found: Tensor, wanted: Tensor, what: str) -> None:
        """Per token: a model with a few huge values at one token must not hide what is wrong at others."""
        self._small(cut, gap(found, wanted), what)

    def _small(self, cut: Cut, off: float, what: str) -> None:
        if not off <= self.allowed:
            raise cut.refusal(f"{what} differ by {off:.2g} of their scale (allowed {self.allowed:.0e})")


def gap(found: Tensor, wanted: Tensor) -> float:
    """Largest difference in a row over the largest value in that row, the worst of all rows."""
    dtype = torch.promote_types(wanted.dtype, torch.float32)
    off = (found.to(dtype) - wanted.to(dtype)).abs().flatten(1).amax(1)
    scale = wanted.to(dtype).abs().flatten(1).amax(1)
    return float((off / scale.clamp_min(1e-30)).max())


def batch_of(model: nn.Module, rows: Rows, collate: Collate, places: list[int]) -> Batch:
    """A batch on the model's device."""
    device = next(model.parameters()).device
    return {k: v.to(device) for k, v in collate([rows[i] for i in places]).items()}


def check_logits(found: Tensor, wanted: Tensor, what: str) -> None:
    """Raises TrainError, beginning with `what`, if logits differ by more than rounding."""
    off = gap(found[None], wanted[None]) if found.shape == wanted.shape else float("inf")
    if not off <= allowed(wanted.dtype, wanted.device.type):
        raise TrainError(f"{what} differ by {off:.2g} of their scale")


def few_examples(model: nn.Module, rows: Rows, collate: Collate) -> Batch:
    """A batch of a few examples.

    Raises:
        TrainError: there are none.
    """
    return batch_of(model, rows, collate, few_places(rows))


def few_places(rows: Rows) -> list[int]:
    """Numbers of a few examples: evenly spread, the shortest, the longest. Raises TrainError if there are none."""
    if not len(rows):
        raise TrainError("there are no examples to keep hidden states of")
    return _few(lengths_of(rows) or [1] * len(rows), _FEW)


def _few(lengths: list[int], count: int) -> list[int]:
    """Numbers of a few examples: evenly spread, the shortest, the longest."""
    last = len(lengths) - 1
    spread = {round(i * last / (count - 3)) for i in range(count - 2)}
    return sorted(spread | {int(np.argmin(lengths)), int(np.argmax(lengths))})


def _read_twice(cut: Cut, rows: Rows, collate: Collate, places: list[int]) -> None:
    first, second = (collate([rows[i] for i in places]) for _ in range(2))
    for name in first:
        if name != "labels" and not torch.equal(first[name], second[name]):
            raise cut.refusal(f"{name} of an example is not the same twice (are examples made anew at each reading?)")


def allowed(precision: torch.dtype, device: str) -> float:
    """Difference that is rounding, relative to scale, on a kind of device."""
    coarse = device == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return max(ALLOWED[precision], 1e-2 if coarse else 0)
