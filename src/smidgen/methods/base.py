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
| `shared(sites)` | tensors that all sites of one `group(site)` share, and `routes` to their parts | - |
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

from smidgen.recipe.recipe import OPTIONAL, Recipe, Term
from smidgen.sites.site import Site

Tensors = Mapping[str, Tensor]


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

    def trains(self, site: Site) -> tuple[str, ...]:
        """Names of the parameters owned by the site that are trained in place."""
        return ()

    def renews(self, name: str) -> bool:
        """Whether a parameter of this name is trained and saved whole, so that it may start anywhere.

        A delta's base may then have other values there: the fingerprint leaves it out, and a change of it is not known.
        """
        return False

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

    def shared(self, sites: Sequence[S]) -> dict[str, Tensor]:
        """Fresh tensors that the sites of a group share, symbol -> tensor; `p` has them beside a site's own."""
        return {}

    def routes(self, site: S, sites: Sequence[S]) -> dict[str, Tensor]:
        """Whole numbers (n,), symbol -> tensor, which parts of what `sites` share this one uses: `p` has them too.

        Drawn once from torch's global generator, saved, never trained.
        """
        return {}

    def from_base(self, p: Tensors, base: Tensors, site: S) -> dict[str, Tensor]:
        """The tensors of `init` as they start at a site whose own tensors are `base`, for a method that looks at them.

        base: "weight" (width_out, width_in) and, where there is one, "bias" (width_out,), in master precision. A
            convolution's weight has all inputs of a channel in one axis.
        """
        return dict(p)

    def before(self, p: Tensors, x: Tensor, site: S) -> Tensor:
        """The module's new input. x: (..., width_in)."""
        return x

    def enters(self, site: Site) -> bool:
        """Whether it edits the site's input, so that a vector that it adds there has the input's width."""
        return self.overrides("before")

    def after(self, p: Tensors, x: Tensor, y: Tensor, site: S) -> Tensor:
        """The module's new output. x: (..., width_in), y: (..., width_out)."""
        return y

    def reads_entry(self, site: Site) -> bool:
        """Whether `after` at a sublayer reads what entered it; else its x is y."""
        return True

    def after_with(self, p: Tensors, x: Tensor, y: Tensor, base: Tensors, site: S) -> Tensor:
        """As `after`, from the module's own tensors too: `base` as in `from_base`, with earlier edits folded in.

        The weight carries no gradient, the bias does.
        """
        return y

    def keys_values(self, p: Tensors, site: S) -> tuple[Tensor, Tensor]:
        """Keys (heads, length, head_dim) and values (heads, length, value_dim) that stand before those of the text."""
        raise NotImplementedError

    def tokens(self, p: Tensors, site: S) -> Tensor:
        """Vectors (length, width_out) that stand among the embedded tokens of the input."""
        raise NotImplementedError

    def due(self, step: int, total: int) -> bool:
        """Whether `event` follows optimiser step `step` (from 1) of `total`."""
        return False

    def event(
        self, step: int, total: int, sites: Sequence[S], parts: Sequence[Tensors], memory: Tensors
    ) -> tuple[Sequence[Tensors], Tensors]:
        """What the tensors of its sites go on as, which may be larger, and what to remember until the next event.

        Old values stay in the leading corner of a larger tensor: there the optimiser goes on with what it knows.
        `memory` is empty at first. Random numbers come from torch's global generator, seeded by run and step.
        """
        raise NotImplementedError

    def grown(self, shapes: Mapping[str, tuple[int, ...]], site: S) -> bool:
        """Whether events can have led from the shapes of `init` to these."""
        return False

    def penalty(self, parts: Sequence[Tensors], sites: Sequence[S]) -> Tensor | None:
        """A scalar that training adds to the loss, from the tensors of all sites; None for nothing."""
        return None

    def scout(self) -> Method | None:
        """The method that Select("scout") trains first; the squares of its tensors are the scores of these."""
        return None

    def settled(self) -> Method:
        """The method that what is saved belongs to: another one if some tensors are dropped on saving."""
        return self

    def settle(self, p: Tensors, site: S) -> dict[str, Tensor]:
        """The tensors of `settled()` that do the same as the trained ones."""
        return dict(p)

    def joined(self, methods: Sequence[Method]) -> Method | None:
        """The method of which one result does what a weighted sum of these methods' does (self is first), if any."""
        return None

    def join(
        self, weights: Sequence[float], methods: Sequence[Method], parts: Sequence[Tensors], site: S
    ) -> dict[str, Tensor]:
        """The tensors of `joined(methods)`: what `methods` add with the tensors `parts`, times `weights`, added up."""
        raise NotImplementedError

    def merge(self, p: Tensors, weight: Tensor, bias: Tensor | None, site: S) -> tuple[Tensor, Tensor | None]:
        """The formula once more, folded. weight: (width_out, width_in), a norm's gain (width,); bias: or None.

        A convolution's weight is (width_out, width_in / groups * kernel size).
        """
        return weight, bias

    def unmergeable(self, site: S) -> str | None:
        """Why what is added here cannot be folded into the weight, in a few words; None if `merge` does it."""
        return None if self.overrides("merge") else "it states no merged weight"

    @classmethod
    def overrides(cls, function: str) -> bool:
        """Whether the method defines `function` itself."""
        return getattr(cls, function) is not getattr(Method, function)


def renewed(recipe: Recipe, model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that some term of a recipe renews; one that is narrowed keeps a part of the base."""
    whole = (term for index, term in enumerate(recipe) if not recipe.narrows(index))
    terms = [term for term in whole if isinstance(term, Method) and term.overrides("renews")]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)] if terms else []
    return tuple(name for name in names if any(term.renews(name) for term in terms))
