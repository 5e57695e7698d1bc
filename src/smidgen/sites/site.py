"""A site: one place in a model that can be tuned. Each kind of place is a type with the fields that it has.

    Site               path, roles, terms, layer, depth, stack
    |- OwnerSite       a module that owns parameters: widths, bias, axis of its channels
    |  |- MapSite      a weight of two axes, or some output rows of one
    |  |  |- LinearSite, UncalledSite
    |  |- NormSite, ConvSite, EmbeddingSite, OtherSite
    |- WeightSite      one weight that its module, or the module around it, reads
    |- TableSite       an embedding as a linear map of one-hot vectors
    |- Sublayer        AttentionSublayer, CrossAttentionSublayer, FeedForwardSublayer
    |- KeyValueSite    an attention that takes more keys and values
    |- BlockSite       a block of a stack
    |- StackSite       a stack of blocks
    |- InputSite       where tokens of a text become vectors
    |- SharedSite      the model itself, which owns what several sites share

Code asks with `isinstance`; `kind` is the type's name for people, files and command lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Self

from torch import nn

from smidgen.sites.fused_rows import Rows
from smidgen.sites.module_kinds import is_bias

_ATTENTION = ("attention", "query", "key", "value", "attention_out")


ROLES = ("embedding", *_ATTENTION, "ff_in", "ff_out", "ff", "block", "norm", "final", "qk", "output")


@dataclass(frozen=True)
class Site:
    """One place in a model that can be tuned; the subclasses say what is there.

    Attributes:
        path: of the module at which an edit stands.
        roles: what it is in its block.
        terms: names and shapes of the parameters that the module itself owns, if the site is that module.
        layer: number of its block within the stack, None outside of all.
        depth: how many blocks that stack has.
        stack: path of the stack.
    """

    path: str
    roles: frozenset[str] = frozenset()
    terms: tuple[tuple[str, tuple[int, ...]], ...] = ()
    layer: int | None = None
    depth: int = 0
    stack: str = ""

    kind: ClassVar[str] = ""
    rows: ClassVar[Rows | None] = None  # of slices alone
    transposed: ClassVar[bool] = False

    @classmethod
    def beside(cls, site: Site, **fields: Any) -> Self:
        """A site of this type in the block of another; `fields` are those of its own and what differs."""
        place = {"roles": site.roles, "layer": site.layer, "depth": site.depth, "stack": site.stack}
        return cls(**{"path": site.path, **place, **fields})

    @property
    def part(self) -> str:
        """Which part of its module a site is; "" for all of it."""
        return ""

    @property
    def name(self) -> str:
        """The path, with the part in brackets for a slice: `h.0.attn.c_attn[query]`, `mlp.Wi[ff_in1]`."""
        return f"{self.path}[{self.part}]" if self.part else self.path

    @property
    def biases(self) -> tuple[str, ...]:
        """The terms that are biases: that of the map or norm, and those that a module has beside its maps."""
        return ()


@dataclass(frozen=True)
class OwnerSite(Site):
    """A module that owns parameters.

    Attributes:
        width_in: of what enters; rows of an embedding.
        width_out: of what leaves.
        bias: name of the bias, None without one.
        axis: where input and output have their widths; methods see them last.
    """

    width_in: int = 0
    width_out: int = 0
    bias: str | None = None
    axis: int = -1

    @property
    def biases(self) -> tuple[str, ...]:
        """The terms that are biases."""
        return tuple(term for term, _ in self.terms if term == self.bias or is_bias(term))


@dataclass(frozen=True)
class MapSite(OwnerSite):
    """A module with one weight of two axes, or some output rows of one.

    A slice has its one own role (query, key, value, ff_in) and nothing else; what covers the whole fused map
    (attention, ff, block) is on the whole site, so that no role selects the same weights twice.

    Attributes:
        rows: of a slice of a fused projection, None for the whole.
        transposed: whether the weight is stored (width_in, width_out).
    """

    rows: Rows | None = None  # type: ignore[misc]  # what is one answer for all others
    transposed: bool = False  # type: ignore[misc]

    @property
    def part(self) -> str:
        """The role of a slice, with a number where several have it: `query`, `ff_in1`."""
        if self.rows is None:
            return ""
        (role,) = self.roles
        return f"{role}{self.rows.start // self.width_out if role == 'ff_in' else ''}"


@dataclass(frozen=True)
class LinearSite(MapSite):
    """A linear map of a weight of its own that is called."""

    kind: ClassVar[str] = "linear"


@dataclass(frozen=True)
class UncalledSite(MapSite):
    """A linear map or convolution whose tensors its owner's code reads and which is never called."""

    kind: ClassVar[str] = "other"


@dataclass(frozen=True)
class NormSite(OwnerSite):
    """A normalisation without running statistics, one or two tensors of one size.

    Attributes:
        gain: name of the gain.
        affine: whether its output is (gain + `offset`) * something + bias by channel, so that what scales and shifts
            the output folds into the two.
        offset: 1 where the gain is kept as its distance from 1, else 0.
    """

    gain: str | None = None
    affine: bool = False
    offset: float = 0.0

    kind: ClassVar[str] = "norm"


@dataclass(frozen=True)
class ConvSite(OwnerSite):
    """A convolution of a weight of its own; widths are channels.

    Attributes:
        stride, padding, dilation, groups: as in torch; padding is "same", "valid" or numbers.
        padding_mode: what stands in the padding: "zeros", "reflect", "replicate" or "circular".
    """

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"

    kind: ClassVar[str] = "conv"

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the kernel: one, two or three."""
        shape: tuple[int, ...] = dict(self.terms)["weight"][2:]
        return shape

    @property
    def fan_in(self) -> int:
        """Values that one output is made of: input channels of a group times places of the kernel."""
        return self.width_in // self.groups * prod(self.kernel)


@dataclass(frozen=True)
class EmbeddingSite(OwnerSite):
    """A table that is looked up by number."""

    kind: ClassVar[str] = "embedding"


@dataclass(frozen=True)
class OtherSite(OwnerSite):
    """A module whose parameters can be trained in place, and of whose formula nothing is known."""

    kind: ClassVar[str] = "other"


@dataclass(frozen=True)
class WeightSite(Site):
    """One weight that is read and belongs to no map that is called, or several of one shape stacked.

    The weights of experts, those of nn.MultiheadAttention, and linear maps whose owner reads their weight.

    Attributes:
        term: its name in the module.
        width_in: last axis, as stored.
        width_out: last but one.
        count: how many are stacked, 1 for a weight of two axes.
    """

    term: str = ""
    width_in: int = 0
    width_out: int = 0
    count: int = 1

    kind: ClassVar[str] = "weight"

    @property
    def part(self) -> str:
        """The name of the weight."""
        return self.term


@dataclass(frozen=True)
class TableSite(Site):
    """An embedding as a linear map of one-hot vectors: the numbers of its `width_in` rows come in."""

    width_in: int = 0
    width_out: int = 0

    kind: ClassVar[str] = "table"
    transposed: ClassVar[bool] = True


@dataclass(frozen=True)
class Sublayer(Site):
    """A span of a block, from the linear map that it is entered by to the one at `path`, that it is left by.

    Attributes:
        width_in: of what enters.
        width_out: of what leaves.
        entry: path of the map that it is entered by.
    """

    width_in: int = 0
    width_out: int = 0
    entry: str = ""


@dataclass(frozen=True)
class AttentionSublayer(Sublayer):
    """Self-attention, before the residual connection."""

    kind: ClassVar[str] = "attention"


@dataclass(frozen=True)
class CrossAttentionSublayer(Sublayer):
    """Attention to an encoder's states."""

    kind: ClassVar[str] = "cross_attention"


@dataclass(frozen=True)
class FeedForwardSublayer(Sublayer):
    """The feed-forward part of a block, or its mixture of experts."""

    kind: ClassVar[str] = "feed_forward"


@dataclass(frozen=True)
class KeyValueSite(Site):
    """An attention module that hands keys and values to transformers' AttentionInterface.

    Attributes:
        heads: number of key heads.
        head_dim: width of a key.
        value_dim: width of a value.
    """

    heads: int = 0
    head_dim: int = 0
    value_dim: int = 0

    kind: ClassVar[str] = "keys_values"


@dataclass(frozen=True)
class InputSite(Site):
    """The embedding of a text's tokens.

    Attributes:
        width_in: tokens of the vocabulary.
        width_out: of their vectors.
        entry: path of the model around it that takes their ids.
    """

    width_in: int = 0
    width_out: int = 0
    entry: str = ""

    kind: ClassVar[str] = "input"


@dataclass(frozen=True)
class BlockSite(Site):
    """A block of a stack, by the hidden states that leave it.

    Attributes:
        width: of the hidden states.
        blocks: paths of all blocks of the stack, in order.
    """

    width: int = 0
    blocks: tuple[str, ...] = ()

    kind: ClassVar[str] = "block"


@dataclass(frozen=True)
class StackSite(Site):
    """A stack of blocks, by the hidden states that enter it, go from block to block, and leave it.

    `path` is the last block's; the layer is 0, since all blocks are read.

    Attributes:
        width: of the hidden states.
        blocks: paths of its blocks, in order.
    """

    width: int = 0
    blocks: tuple[str, ...] = ()

    kind: ClassVar[str] = "stack"


@dataclass(frozen=True)
class SharedSite(Site):
    """The model itself, as the owner of what the sites of one group share; its one role is the group's name."""

    kind: ClassVar[str] = "shared"


def module_at(model: nn.Module, path: str) -> nn.Module:
    """`get_submodule` for a path that is known to exist: a switch of deltas looks up a hundred."""
    found = model
    for name in path.split(".") if path else ():
        child = found._modules[name]
        assert child is not None
        found = child
    return found
