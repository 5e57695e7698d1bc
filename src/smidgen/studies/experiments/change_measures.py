"""Four ways to say how much a tensor changed, and what each of them can and cannot show."""

from __future__ import annotations

import math

from torch import Tensor

MEASURES = {
    "absolute": "mean |θ − θ₀|",
    "relative": "mean |θ − θ₀| / mean |θ₀|",
    "rms": "√ mean (θ − θ₀)²",
    "per_lr": "mean |θ − θ₀| / Σ lr",
}
TITLES = {
    "absolute": "absolute change",
    "relative": "relative change",
    "rms": "RMS change",
    "per_lr": "change per Σ lr",
}
CAVEAT = (
    "Under Adam every value moves by about learning rate × steps × how steadily its gradient kept its sign. The "
    "absolute change therefore says little of how much a tensor matters, and it favours tensors without weight decay. "
    "Norm gains lie near 1 and dense weights near 0.03, so dividing by the size of the pretrained values may turn the "
    "ranking over. Both are shown, and neither alone is evidence."
)


def measure(base: Tensor, tuned: Tensor, lr_steps: float | None = None) -> tuple[float, float, float, float]:
    """The four measures of one tensor, in the order of `MEASURES`.

        absolute   (1/n) * sum |d|               d = tuned - base    (the published one: Ben-Zaken et al. 2022, BitFit,
                                                                      figure 2; ValizadehAslani and Liang 2024)
        relative   sum |d| / sum |base|          nan where base is all zero
        rms        sqrt((1/n) * sum d^2)
        per_lr     absolute / lr_steps           nan where lr_steps is None

    Args:
        base, tuned: of one shape, any float dtype; compared in float64.
        lr_steps: the sum over the steps of the learning rate that this tensor had.
    """
    start = base.detach().double()
    moved = (tuned.detach().double() - start).abs()
    absolute, size = float(moved.mean()), float(start.abs().mean())
    rms = float(moved.square().mean().sqrt())
    return absolute, absolute / size if size else math.nan, rms, absolute / lr_steps if lr_steps else math.nan
