"""What a method is: a frozen dataclass of pure tensor functions that never sees how it is attached.

A method says what it does by the functions that it defines; the ports read them.

| function | meaning | port |
|---|---|---|
| `trains(site)` | names of the site's own parameters that are trained | parameter |
| `renews(name)` | whether a parameter is trained and saved whole, wherever it started | parameter |
| `acts(site)` | whether it adds something here; then `init(site)` gives the tensors | - |
| `before(p, x, site)` | the new input of the site's module | module |
| `after(p, x, y, site)` | the new output, from the input and the output so far | module |
| `after_with(p, x, y, base, site)` | the same, for a method that reads the module's own weight | module |
| `keys_values(p, site)` | keys and values that every query sees beside the text's own | attention |
| `tokens(p, site)` | vectors among the embedded tokens of the text | input |
| `shared(sites)` | tensors that all sites of one `group(site)` share, and `shared_indices` to their parts | - |
| `event(step, total, sites, parts, memory)` | new tensors at the optimiser steps that are `due` | - |
| `penalty(parts, sites)` | what is added to the loss | - |
| `settle(p, site)` | what is saved of the trained tensors, for the method `settled()` | - |
| `join(weights, methods, parts, site)` | a weighted sum of several results, as one of `joined(methods)` | - |
| `merge(p, weight, bias, site)` | weight and bias that do the same without the method | - |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

from torch import Tensor, nn

from smidgen.methods.capabilities import EditsInput, Merges, Renews, Tensors, check_whole
from smidgen.recipe.recipe import OPTIONAL, Recipe, Term
from smidgen.sites.site import Site

S = TypeVar("S", bound=Site)  # the type of the sites at which a method acts


@dataclass(frozen=True)
class Method(Term, Generic[S], abstract=True):
    """Base of all methods. A subclass is one file; its docstring gives paper, formula, shapes and departures.

    `Method[LinearSite]` is one that acts at linear maps: `acts` is asked of every site, what computes gets those alone.

    Class attributes:
        lr: learning rate that `fit` uses when none is given.
        keeps: symbols whose start is part of the formula: `p` has it beside the trained tensor, as `A0` beside `A`.
        linear: whether what it adds is linear in the change of its tensors from a constant start (that of `init`).
        exceptions: conformance check -> reason why this method is excused from it.
    """

    lr: ClassVar[float] = 1e-3
    keeps: ClassVar[tuple[str, ...]] = ()
    linear: ClassVar[bool] = False
    exceptions: ClassVar[Mapping[str, str]] = {}

    # a module path, or the end of one, that everything the method touches must lie in ("language_model"), or several
    stack: str | tuple[str, ...] | None = field(default=None, kw_only=True, metadata={OPTIONAL: True})

    def __init_subclass__(cls, abstract: bool = False, **kwargs: object) -> None:
        super().__init_subclass__(abstract=abstract, **kwargs)
        check_whole(cls)

    def trains(self, site: Site) -> tuple[str, ...]:
        """Names of the parameters owned by the site that are trained in place."""
        return ()

    def gives_way(self) -> bool:
        """Whether it leaves to the other terms of a sum what they train."""
        return False

    def acts(self, site: Site) -> bool:
        """Whether the method adds tensors at this site."""
        return False

    def may_rest(self, site: Site, term: str) -> bool:
        """Whether this tensor may stand still in training although nothing is wrong (say why in the file)."""
        return False

    def may_idle(self, site: Site, term: str) -> bool:
        """Whether this tensor may get no gradient at all although nothing is wrong (say why in the file)."""
        return False

    def rate(self, term: str) -> float:
        """Learning rate of a tensor over the method's own."""
        return 1.0

    def check(self, sites: Sequence[Site]) -> None:
        """Raise PlanError if a field names something that this model does not have."""

    def input_dropout(self) -> float:
        """Share of the input that the module port drops, in training, before `after` sees it."""
        return 0.0

    def init(self, site: S) -> dict[str, Tensor]:
        """Fresh tensors for a site, symbol -> tensor, drawn from torch's global generator."""
        return {}

    def group(self, site: S) -> str:
        """Which sites share the tensors of `shared`: those that give the same name (no dots in it)."""
        return "all"

    def shared_indices(self, site: S, sites: Sequence[S]) -> dict[str, Tensor]:
        """Whole numbers (n,), symbol -> tensor, which parts of what `sites` share this one uses: `p` has them too.

        Drawn once from torch's global generator, saved, never trained.
        """
        return {}

    def enters(self, site: Site) -> bool:
        """Whether it edits the site's input, so that a vector that it adds there has the input's width."""
        return isinstance(self, EditsInput)

    def reads_entry(self, site: Site) -> bool:
        """Whether `after` at a sublayer reads what entered it; else its x is y."""
        return True

    def scout(self) -> Method | None:
        """The method that Select("scout") trains first; the squares of its tensors are the scores of these."""
        return None

    def settled(self) -> Method:
        """The method that what is saved belongs to: another one if some tensors are dropped on saving."""
        return self

    def settle(self, p: Tensors, site: S) -> dict[str, Tensor]:
        """The tensors of `settled()` that do the same as the trained ones."""
        return dict(p)

    def unmergeable(self, site: S) -> str | None:
        """Why what is added here cannot be folded into the weight, in a few words; None if `merge` does it."""
        return None if isinstance(self, Merges) else "it states no merged weight"


def adds(cls: type[Method]) -> bool:
    """Whether methods of a class may add tensors somewhere."""
    return cls.acts is not Method.acts


def trains_in_place(cls: type[Method]) -> bool:
    """Whether methods of a class may train tensors of the base."""
    return cls.trains is not Method.trains


def renewed(recipe: Recipe, model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that some term of a recipe renews; one that is narrowed keeps a part of the base."""
    whole = (term for index, term in enumerate(recipe) if not recipe.narrows(index))
    terms = [term for term in whole if isinstance(term, Renews)]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)] if terms else []
    return tuple(name for name in names if any(term.renews(name) for term in terms))
