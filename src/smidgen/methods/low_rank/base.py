"""What methods of low rank on linear maps have in common: where they act, how strongly, and their dropout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from smidgen.common.errors import RecipeError
from smidgen.methods.base import Method
from smidgen.methods.field_checks import above, at_least, layers_field, names_field, share_field
from smidgen.sites.site import ConvSite, LinearSite, Site, TableSite, WeightSite
from smidgen.sites.targeting import Layers, as_names, check_targets, in_layers, targeted

MapLike = LinearSite | TableSite | ConvSite | WeightSite


@dataclass(frozen=True)
class LowRank(Method[MapLike], abstract=True):
    """Base of the methods that add s * B ... A to linear maps; `LoRA` says what its fields are."""

    rank: int = 8
    alpha: float | None = 16
    target: str | tuple[str, ...] = ("query", "value")
    layers: Layers = None
    exclude: str | tuple[str, ...] = ()
    dropout: float = 0.0

    lr: ClassVar[float] = 3e-3
    least_rank: ClassVar[int] = 1

    def __post_init__(self) -> None:
        name = type(self).__name__
        at_least(name, "rank", self.rank, self.least_rank)
        if self.alpha is not None:
            above(name, "alpha", self.alpha, 0)
        names_field(name, "target", self.target)
        layers_field(name, self.layers)
        names_field(name, "exclude", self.exclude, least=0)
        share_field(name, "dropout", self.dropout)

    @property
    def scale(self) -> float:
        """alpha / rank; alpha=None means alpha = rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def check(self, sites: Sequence[Site]) -> None:
        """Each name of `target` and `exclude` must stand for something."""
        for field, names in (("target", self.target), ("exclude", self.exclude)):
            check_targets(type(self).__name__, field, as_names(names), sites)

    def input_dropout(self) -> float:
        """Of what enters A."""
        return self.dropout

    def acts(self, site: Site) -> bool:
        """At maps of `target` in `layers` that `exclude` does not name."""
        names = as_names(self.target)
        if not isinstance(site, LinearSite):
            return False
        if min(site.width_in, site.width_out) == 1:
            # a gate with one output, such as that of a shared expert: its whole weight is of rank 1
            names = tuple(name for name in names if name != "linear")
        wanted = targeted(site, names) and not targeted(site, as_names(self.exclude))
        return wanted and in_layers(site, self.layers)

    def check_rank(self, site: MapLike) -> None:
        """Raise RecipeError if the rank is above the smaller side of a map."""
        wide = site.fan_in if isinstance(site, ConvSite) else site.width_in
        groups = site.groups if isinstance(site, ConvSite) else 1
        most = min(wide * groups, site.width_out)
        if self.rank % groups:
            raise RecipeError(
                f"{type(self).__name__}: rank={self.rank} is no multiple of the {groups} groups of the convolution "
                f"{site.name}, each of which has a product of its own; take one that is, or "
                f"exclude={site.path.rpartition('.')[2]!r}"
            )
        if self.rank > most:
            raise RecipeError(
                f"{type(self).__name__}: rank={self.rank} is above the smaller side of {site.name} "
                f"({site.width_out} x {wide}); at most {most} works, or "
                f"exclude={site.path.rpartition('.')[2]!r}"
            )
