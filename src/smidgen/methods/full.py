"""Full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from smidgen.fields import Layers, in_layers, layers_field
from smidgen.method import Method
from smidgen.sites import Site


@dataclass(frozen=True)
class Full(Method):
    """Train every pretrained parameter: the arm that the others are measured against.

    Devlin et al. 2019, BERT, arXiv:1810.04805, section 3.2 (fine-tuning).

        theta = argmin loss(theta),  starting at the pretrained point

    Shapes:
        theta: as the model has them

    Fields:
        layers: as in LN; everything outside the blocks is left out when it is given.

    Departures: the head has its own learning rate, as in every other arm.
    """

    layers: Layers = None

    lr: ClassVar[float] = 5e-5

    def __post_init__(self) -> None:
        layers_field("Full", self.layers)

    def trains(self, site: Site) -> tuple[str, ...]:
        whole = site.rows is None and in_layers(site, self.layers)
        return tuple(term for term, _ in site.terms) if whole else ()

    def may_rest(self, site: Site, term: str) -> bool:
        # The bias of a key has zero gradient under softmax.
        return "key" in site.roles and term == site.bias
