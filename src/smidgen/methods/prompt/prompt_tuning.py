"""Prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smidgen.methods.base import Method, Tensors
from smidgen.methods.field_checks import at_least, one_of
from smidgen.sites.site import InputSite, Site


@dataclass(frozen=True)
class PromptTuning(Method[InputSite]):
    """Put trained vectors among the embedded tokens of the input.

    Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv:2104.08691, section 2; section
    2.1 for the start.

        h = model([P; E(text)])        [CLS] models: [E(CLS); P; E(rest)]

    Shapes:
        P: (length, width_out)  different rows of the embedding, drawn at random, or uniform in +-0.5

    Fields:
        length: number of vectors.
        start: "vocabulary" or "uniform".

    Departures: hidden states at the prompt's places are taken out before the head, so that logits, labels and
    poolings are those of the text (a causal model's guess at the text's first token, made behind the prompt, does not
    count); the authors draw from the 5,000 commonest tokens, here from all. The vectors take
    positions like tokens, and where the model scales or projects embeddings by itself they are put in behind the scale
    and before the projection.
    """

    length: int = 20
    start: str = "vocabulary"

    lr: ClassVar[float] = 2e-2
    exceptions: ClassVar[dict[str, str]] = {"starts_as_identity": "any further token is attended to"}

    def __post_init__(self) -> None:
        at_least("PromptTuning", "length", self.length, 1)
        one_of("PromptTuning", "start", self.start, ("vocabulary", "uniform"))

    def acts(self, site: Site) -> bool:
        return isinstance(site, InputSite)

    def init(self, site: InputSite) -> dict[str, Tensor]:
        return {"P": torch.empty(self.length, site.width_out).uniform_(-0.5, 0.5)}

    def from_base(self, p: Tensors, base: Tensors, site: InputSite) -> dict[str, Tensor]:
        if self.start == "uniform":
            return dict(p)
        count = len(base["weight"])
        again = self.length > count  # as the authors' code: twice only where there are not enough
        rows = torch.randint(count, (self.length,)) if again else torch.randperm(count)[: self.length]
        return {"P": base["weight"][rows.to(base["weight"].device)].clone()}

    def tokens(self, p: Tensors, site: InputSite) -> Tensor:
        return p["P"]

    def unmergeable(self, site: InputSite) -> str | None:
        return "tokens of its own are no part of a weight"
