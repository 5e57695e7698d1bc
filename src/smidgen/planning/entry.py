"""Entry: one method at one site, as a plan lists it, with the values that a selection left to train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from torch import Tensor

from smidgen.methods.base import Method
from smidgen.sites.site import NormSite, SharedSite, Site

Shape = tuple[int, ...]


INDICES, START, PACKED = ".indices", ".start", "indices"


@dataclass(frozen=True, eq=False)
class Subset:
    """The chosen values of one tensor.

    Attributes:
        indices: (k,) int64, ascending, into the flattened tensor; k may be 0 for a tensor that is added.
        shape: of the whole tensor.
        start: whether a file needs the whole start beside the values, because it was drawn at random.
    """

    indices: Tensor
    shape: Shape
    start: bool = False


@dataclass(frozen=True)
class Entry:
    """One method at one site: existing parameters that it trains, or tensors that it adds.

    Attributes:
        index: of the method in the recipe.
        method: what trains or adds.
        site: where; a `SharedSite` for tensors that several sites share.
        terms: name (weight, bias) or symbol (A, B) and whole shape of each tensor that it trains.
        added: whether the tensors are new, not parameters of the model.
        subsets: term -> the values that a selection kept of it.
        settled: symbol and shape of what is saved, where that is not what is trained.
        sites: all that share tensors, for the one that owns these and for each that uses them.
        shared_indices: symbol and shape of the whole numbers that say which shared parts the site uses.
        grown: whether the shapes are those after growth in training.
    """

    index: int
    method: Method
    site: Site
    terms: tuple[tuple[str, Shape], ...]
    added: bool
    subsets: Mapping[str, Subset] = field(default_factory=dict, compare=False)
    settled: tuple[tuple[str, Shape], ...] = ()
    sites: tuple[Site, ...] = ()
    shared_indices: tuple[tuple[str, Shape], ...] = ()
    grown: bool = False

    @property
    def key(self) -> str:
        """Name of the edit on its module: the index in the recipe, with the role for a slice."""
        part = self.method.group(self.sites[0]) if self.owns_shared else self.site.part
        return f"{self.index}-{part}" if part else str(self.index)

    @property
    def owns_shared(self) -> bool:
        """Whether it is the owner of what `sites` share, above all of them."""
        return isinstance(self.site, SharedSite)

    def name(self, term: str) -> str:
        """Saved name of a tensor: `path.term`, or `path.edits.key.symbol`."""
        prefix = f"{self.site.path}." if self.site.path else ""
        return f"{prefix}edits.{self.key}.{term}" if self.added else prefix + term

    def trained(self) -> Iterator[tuple[str, str, Shape]]:
        """Term, saved name and shape of what is trained; (k,) where a selection left k values of a tensor."""
        for term, shape in self.terms:
            subset = self.subsets.get(term)
            if subset is None:
                yield term, self.name(term), shape
            elif len(subset.indices):
                yield term, self.name(term), (len(subset.indices),)

    def names(self) -> Iterator[tuple[str, Shape]]:
        """Saved name and shape of each trained tensor."""
        for _, name, shape in self.trained():
            yield name, shape

    def saved(self) -> Iterator[tuple[str, Shape]]:
        """Name and shape of everything that a file holds for this entry: `names`, indices, starts."""
        if self.settled:
            yield from ((self.name(term), shape) for term, shape in self.settled)
            return
        yield from self.names()
        for term, subset in self.subsets.items():
            if len(subset.indices):
                yield self.name(term) + INDICES, (len(subset.indices),)
            if subset.start and term not in self.kept:
                yield self.name(term) + START, subset.shape
        yield from ((self.name(term) + START, shape) for term, shape in self.terms if term in self.kept)
        yield from ((self.name(term) + INDICES, shape) for term, shape in self.shared_indices)

    @property
    def kept(self) -> tuple[str, ...]:
        """The added tensors whose start the formula needs."""
        return self.method.keeps if self.added and not self.owns_shared else ()

    @property
    def values(self) -> int:
        """Number of trained values."""
        return sum(prod(shape) for _, shape in self.names())

    @property
    def term_kinds(self) -> dict[str, str]:
        """Term -> "gain" or "bias" for a norm, else the term's own name (weight, bias, A, ...)."""
        norm = self.site if isinstance(self.site, NormSite) and not self.added else None
        known = {norm.gain: "gain", norm.bias: "bias"} if norm else {}
        return {term: known.get(term, term) for term, _ in self.terms}
