"""Which log-probabilities a Fisher information differentiates.

F = E_x E_y (d log p(y|x) / d theta)^2, where y is the label (empirical), drawn from the model (true), or summed over
all classes with their probabilities (expected). Each kind comes down to terms t of one example, with F = sum (dt)^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smidgen.common.errors import DataError, nearest
from smidgen.data.kinds.base import kind_named
from smidgen.data.labels import IGNORED, LabelPlace

KINDS = ("empirical", "true", "expected")


@dataclass(frozen=True)
class Likelihood:
    """The log-probability of a whole example under a model, and whose labels it takes.

    Attributes:
        task: name of the task's kind: "classification", "regression", "tokens", "causal-lm", ...
        kind: "empirical", "true" or "expected".
        samples: draws per example of kind "true".
        sigma: standard deviation of a regression's label around the model's output, in units of the label.
        seed: of the draws; an example's draws depend on nothing else but its number.

    Raises:
        DataError: an unknown kind, a number out of range, or labels that cannot be summed.
    """

    task: str
    kind: str = "empirical"
    samples: int = 1
    sigma: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            hint = nearest(str(self.kind), KINDS)
            raise DataError(f"kind={self.kind!r} is not one of {', '.join(KINDS)}{hint}")
        about = kind_named(self.task)
        if about.improbable is not None:
            raise DataError(f"Fisher information needs the probability of an example's labels, and {about.improbable}")
        if self.kind == "expected" and about.uncountable is not None:
            many = about.uncountable
            raise DataError(f"kind='expected' would sum over all {many} of a {self.task} task; use kind='true'")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise DataError(f"samples={self.samples!r} must be a whole number of at least 1")
        if not self.sigma > 0:
            raise DataError(f"sigma={self.sigma!r} must be above 0")

    def terms(self, logits: Tensor, labels: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        """Tensors (B,) whose squared gradients, example by example, add up to the Fisher information.

        Args:
            logits: (B, C), (B, T, C) where labels stand at positions, (B, 1) for numbers.
            labels: (B,) or (B, T), -100 where there is none.
            numbers: number of each example, which seeds its draws.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        about = kind_named(self.task)
        if about.normal:
            return self._normal(logits.squeeze(-1), labels.to(logits.dtype), numbers)
        logits, labels = about.aligned(logits, labels)
        logp = logits.log_softmax(-1)
        kept = labels != IGNORED
        if self.kind == "expected":
            weights = logp.detach().exp().sqrt()  # squared they are the probabilities
            return [(weights * logp * kept[..., None])[:, 0, c] for c in range(logp.shape[-1])]
        if self.kind == "empirical":
            return [_picked(logp, labels, kept)]
        scale = self.samples**-0.5
        return [scale * _picked(logp, drawn, kept) for drawn in self._draw(logp.detach(), numbers)]

    def _normal(self, f: Tensor, labels: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        """Terms of N(f, sigma^2), f: (B,)."""
        if self.kind == "expected":
            return [f / self.sigma]
        if self.kind == "empirical":
            return [-0.5 * ((labels - f) / self.sigma) ** 2]
        noise = np.stack([self._random(n).standard_normal(self.samples) for n in numbers])
        drawn = torch.from_numpy(noise).to(f)  # (B, samples); (y - f) / sigma
        return [self.samples**-0.5 * draw * f / self.sigma for draw in drawn.T]

    def _draw(self, logp: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        """Labels (B, N) from logp (B, N, C), one per position; longer padding draws the same ones."""
        shape = (logp.shape[1], self.samples)
        uniform = torch.from_numpy(np.stack([self._random(n).random_sample(shape) for n in numbers])).to(logp.device)
        steps = logp.double().exp().cumsum(-1)  # (B, N, C)
        last = logp.shape[-1] - 1
        return [
            torch.searchsorted(steps, u[..., None].contiguous(), right=True).squeeze(-1).clamp(max=last)
            for u in uniform.unbind(-1)
        ]

    def _random(self, number: int) -> np.random.RandomState:
        # RandomState's stream is frozen across numpy versions, and the first draws do not depend on how many follow.
        return np.random.RandomState([self.seed % 2**32, number])


def _picked(logp: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
    """Sum over positions of the labels' log-probabilities. logp: (B, N, C) -> (B,)."""
    found = logp.gather(-1, (labels * kept)[..., None]).squeeze(-1)
    return (found * kept).sum(1)


def check_fit(task: str, logits: Tensor, labels: Tensor, names: Sequence[str], wanted: int | None = None) -> None:
    """Raise DataError unless the labels fit the head. names: of the examples; wanted: the task's number of labels."""
    width, about = logits.shape[-1], kind_named(task)
    if wanted is not None and width != wanted:
        raise DataError(
            f"the model's head gives {width} values, the task has {wanted} label{'s' * (wanted != 1)}; load the model "
            "with smidgen.load(name, task=task)"
        )
    ndim = 2 if about.labels_at is LabelPlace.EXAMPLE else 3
    if logits.ndim != ndim or (about.normal and width != 1):
        raise DataError(f"a {task} task does not fit logits of shape {tuple(logits.shape)}; is it the right class?")
    if about.normal:
        return
    if labels.shape != logits.shape[:-1]:
        raise DataError(f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}")
    wrong = ((labels != IGNORED) & ((labels < 0) | (labels >= width))).reshape(len(labels), -1)
    for row in wrong.any(1).nonzero().flatten().tolist():
        value = labels[row].reshape(-1)[wrong[row]][0].item()
        raise DataError(f"{names[row]} has the label {value}; the model's head knows 0 to {width - 1}")
