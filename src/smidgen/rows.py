"""Row: one method at one site, as a plan lists it, with the values that a selection left to train."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from smidgen.method import Method
from smidgen.sites import Site

Shape = tuple[int, ...]
SHARED = "shared"  # kind of the site, above all others, that owns what they share
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
class Row:
    """One method at one site: existing parameters that it trains, or tensors that it adds."""

    index: int
    method: Method
    site: Site
    terms: tuple[tuple[str, Shape], ...]
    added: bool
    subsets: Mapping[str, Subset] = field(default_factory=dict, compare=False)
    settled: tuple[tuple[str, Shape], ...] = ()  # what is saved where that is not what is trained
    sites: tuple[Site, ...] = ()  # all that share tensors, for the one that owns these and for each that uses them
    routes: tuple[tuple[str, Shape], ...] = ()
    grown: bool = False  # whether the shapes are those after events

    @property
    def key(self) -> str:
        """Name of the edit on its module: the index in the recipe, with the role for a slice."""
        if self.site.kind == SHARED:
            return f"{self.index}-{self.method.group(self.sites[0])}"
        if self.site.rows is None:
            return str(self.index)
        return f"{self.index}-{self.site.name[len(self.site.path) + 1 : -1]}"

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
        """Name and shape of everything that a file holds for this row: `names`, indices, starts."""
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
        yield from ((self.name(term) + INDICES, shape) for term, shape in self.routes)

    @property
    def kept(self) -> tuple[str, ...]:
        """The added tensors whose start the formula needs."""
        return self.method.keeps if self.added and self.site.kind != SHARED else ()

    @property
    def values(self) -> int:
        """Number of trained values."""
        return sum(prod(shape) for _, shape in self.names())

    @property
    def term_kinds(self) -> dict[str, str]:
        """Term -> "gain" or "bias" for a norm, else the term's own name (weight, bias, A, ...)."""
        known = {self.site.gain: "gain", self.site.bias: "bias"} if self.site.kind == "norm" and not self.added else {}
        return {term: known.get(term, term) for term, _ in self.terms}


def is_value(name: str) -> bool:
    """Whether a saved name is that of trained values, not of their indices or start."""
    return not name.endswith((INDICES, START))


def pack_indices(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All `<name>.indices` end to end, in the order of names, as one tensor: headers cost more than numbers."""
    packed = {name: t for name, t in tensors.items() if not name.endswith(INDICES)}
    parts = [t for name, t in sorted(tensors.items()) if name.endswith(INDICES)]
    return {**packed, PACKED: torch.cat(parts)} if parts else packed


def packed_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes that `pack_indices` gives."""
    packed = {name: tuple(shape) for name, shape in shapes.items() if not name.endswith(INDICES)}
    counts = [shape[0] for name, shape in shapes.items() if name.endswith(INDICES)]
    return {**packed, PACKED: (sum(counts),)} if counts else packed


def unpack_indices(tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The inverse of `pack_indices`, given the shapes before it."""
    names = sorted(name for name in shapes if name.endswith(INDICES))
    if not names:
        return dict(tensors)
    parts = tensors[PACKED].split([shapes[name][0] for name in names])
    return {n: t for n, t in tensors.items() if n != PACKED} | dict(zip(names, parts, strict=True))


def safetensors_size(shapes: Mapping[str, Shape], itemsize: int = 4) -> int:
    """Bytes of a safetensors file with these tensors, indices packed: 8 + header padded to 8 + data."""
    header, offset = {}, 0
    # safetensors writes float32 before int32, each in the order of names
    for name, shape in sorted(packed_shapes(shapes).items(), key=lambda item: (item[0] == PACKED, item[0])):
        end = offset + prod(shape) * itemsize
        dtype = "I32" if name == PACKED else "F32"
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset
