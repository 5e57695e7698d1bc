"""How the next token of a text is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from smidgen.serving.errors import ServingError

NOTHING: Any = torch.empty(1, 0, dtype=torch.long)  # the ids before, which no warper here reads


@dataclass(frozen=True)
class Sampling:
    """Settings of a text that is written.

    Attributes:
        max_tokens: most tokens to write.
        temperature: 0 takes the most probable token.
        top_p: smallest set of tokens with this probability; 1 for all.
        top_k: so many of the most probable; 0 for all.
        stop: strings at which the text ends, not part of it.
        seed: of the draw; None for one from the system.

    Raises:
        ServingError: a setting is out of its range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ServingError(f"max_tokens={self.max_tokens}: at least 1")
        if not 0 <= self.temperature <= 100:
            raise ServingError(f"temperature={self.temperature}: a number from 0 to 100")
        if not 0 < self.top_p <= 1:
            raise ServingError(f"top_p={self.top_p}: above 0, at most 1")
        if self.top_k < 0:
            raise ServingError(f"top_k={self.top_k}: 0 for all, or a number of tokens")
        if any(not text for text in self.stop) or len(self.stop) > 16:
            raise ServingError("stop: at most 16 strings, none of them empty")


class Sampler:
    """Chooses a text's tokens one after another."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling, self.generator = sampling, torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed % 2**63)
        self.warpers = LogitsProcessorList()
        if sampling.temperature not in (0, 1):
            self.warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, logits: Tensor) -> int:
        """The next token of logits (V,).

        Raises:
            ServingError: they are not finite.
        """
        if not bool(torch.isfinite(logits).any()) or bool(torch.isnan(logits).any()):
            raise ServingError("the model's outputs are not finite (NaN): the delta, or the base, is damaged")
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        scores = self.warpers(NOTHING, logits[None].float())
        return int(torch.multinomial(scores[0].softmax(-1), 1, generator=self.generator))
