"""What a plan asks about the sites of one type: where they are, what acts at them, why something does not fit.

The half of a port that needs no hook. `smidgen.planning.rules` has the library's own; a port of one's own brings its
rules with it (`smidgen.ports.base`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from smidgen.common.errors import PlanError
from smidgen.methods.base import Method
from smidgen.methods.capabilities import Tensors, functions_of
from smidgen.planning.entry import Entry
from smidgen.sites.site import Site


@dataclass(frozen=True)
class Missed:
    """A module that a method's words mean and that it does not reach, a site in it, and why."""

    path: str
    place: Site
    reason: str


class SiteRules:
    """Base of the rules of all types of sites.

    Class attributes:
        sites: the types.
        capabilities: a method that acts at such a site has one of these, see `smidgen.methods.capabilities`.
        holds: whether what lies in the site's module, or between its first and last, counts as reached by an edit.
        keeps_tokens: whether an edit leaves to each token its own place, so that blocks may be computed for some only.
    """

    sites: ClassVar[tuple[type[Site], ...]] = ()
    capabilities: ClassVar[tuple[type, ...]] = ()
    holds: ClassVar[bool] = False
    keeps_tokens: ClassVar[bool] = True

    def find(self, model: nn.Module, found: Sequence[Site]) -> Sequence[Site]:
        """The sites of these types, in the order of computation.

        Args:
            found: the modules that own parameters, and what rules that were registered before have found.
        """
        return ()

    def fresh(self, method: Method, site: Site) -> dict[str, Tensor]:
        """Fresh tensors of a method at a site, symbol -> tensor."""
        return method.init(site)

    def base_tensors(self, model: nn.Module, site: Site) -> Tensors | None:
        """The base's own tensors for a method that starts from them (`StartsFromBase`); None if there are none."""
        return None

    def unmatched(self, method: Method, model: nn.Module, sites: Sequence[Site]) -> str:
        """Why a method with a capability of these sites finds none, "; and so on"; "" if there is nothing to say."""
        return ""

    def refuse(self, method: Method, model: nn.Module, sites: Sequence[Site], entries: Sequence[Entry]) -> None:
        """Raise PlanError if a method with a capability of these sites reaches some, where it has to reach all."""

    def refuse_together(self, model: nn.Module, entries: Sequence[Entry]) -> None:
        """Raise PlanError if what all methods of a recipe add at these sites does not go together.

        Args:
            entries: of the whole recipe.
        """

    def missed(self, method: Method, model: nn.Module, sites: Sequence[Site]) -> Iterator[Missed]:
        """What the words of a method with a capability of these sites mean and no site is there for."""
        return iter(())


RULES: dict[type[Site], SiteRules] = {}


def register_rules(rules: SiteRules) -> None:
    """Let plans look for sites of these types, behind those that are known."""
    RULES.update(dict.fromkeys(rules.sites, rules))


def all_rules() -> tuple[SiteRules, ...]:
    """All that are registered, in that order."""
    return tuple(dict.fromkeys(RULES.values()))


def rules_for(method: Method) -> tuple[SiteRules, ...]:
    """Those of sites at which a method could act by what it defines."""
    return tuple(rules for rules in all_rules() if isinstance(method, rules.capabilities))


def rules_of(site: Site) -> SiteRules:
    """Those of a site's type, or of the nearest type above that has some."""
    return next(RULES[cls] for cls in type(site).__mro__ if cls in RULES)


def check_capable(method: Method, site: Site) -> None:
    """Raises PlanError if a method says that it acts at a site and defines nothing that could act there."""
    wanted = rules_of(site).capabilities
    if wanted and not isinstance(method, wanted):
        names = " or ".join(f"{functions_of(capability)[0]}()" for capability in wanted)
        raise PlanError(f"{method} acts at {site.name} ({site.kind}), where {names} would act, and defines none")
