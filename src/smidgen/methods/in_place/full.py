"""Full fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from smidgen.common.errors import PlanError, nearest
from smidgen.methods.base import Method
from smidgen.methods.field_checks import layers_field, names_field
from smidgen.sites.site import OwnerSite, Site
from smidgen.sites.targeting import Layers, as_names, in_layers


@dataclass(frozen=True)
class Full(Method):
    """Train every pretrained parameter, the arm that others are measured by, or named modules.

    Devlin et al. 2019, BERT, arXiv:1810.04805, section 3.2 (fine-tuning).

        theta = argmin loss(theta),  starting at the pretrained point

    Shapes:
        theta: as the model has them

    Fields:
        layers: as in LN; everything outside the blocks is left out when it is given.
        target: None for all, or names of modules or parameters, each the end of a path or a run inside it:
            `LN() + Full(target="pooler")` trains the pooler too and saves it whole, wherever it started (PEFT's
            `modules_to_save`). What other terms of the sum train is left to them.

    Departures: the head has its own learning rate, as in every other arm.
    """

    layers: Layers = None
    target: str | tuple[str, ...] | None = None

    lr: ClassVar[float] = 5e-5
    later: ClassVar[Mapping[str, object]] = {"target": None}

    def __post_init__(self) -> None:
        layers_field("Full", self.layers)
        if self.target is not None:
            names_field("Full", "target", self.target)

    def check(self, sites: Sequence[Site]) -> None:
        known = dict.fromkeys(f"{site.path}.{term}" for site in sites for term, _ in site.terms)
        for name in self._names:
            if not any(_holds(path, name) for path in known):
                parts = {part for path in known for part in path.split(".")}
                raise PlanError(
                    f"{self}: the model has no module or parameter {name!r}{nearest(name, [*known, *parts])}"
                )

    @property
    def _names(self) -> tuple[str, ...]:
        return as_names(self.target) if self.target is not None else ()

    def _wants(self, name: str) -> bool:
        return self.target is None or any(_holds(name, wanted) for wanted in self._names)

    def trains(self, site: Site) -> tuple[str, ...]:
        whole = not site.part and in_layers(site, self.layers)
        return tuple(term for term, _ in site.terms if self._wants(f"{site.path}.{term}")) if whole else ()

    def renews(self, name: str) -> bool:
        return self.target is not None and self.layers is None and self._wants(name)

    def gives_way(self) -> bool:
        return self.target is not None

    def may_idle(self, site: Site, term: str) -> bool:
        # It trains everything there is, also what a task never uses (XLNet's mask_emb, for masked positions).
        return True

    def may_rest(self, site: Site, term: str) -> bool:
        # The bias of a key has zero gradient under softmax.
        return "key" in site.roles and isinstance(site, OwnerSite) and term == site.bias


def _holds(path: str, name: str) -> bool:
    """Whether a dotted name is a run of whole parts of a path."""
    return f".{name}." in f".{path}."
