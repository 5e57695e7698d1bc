"""What a method can do, as types: a method has a capability if it defines the functions of its protocol.

A port says by `Port.capabilities` which of them act at its sites; everybody else asks with `isinstance`. A class that
defines some functions of a protocol and lacks others is an error where it is defined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from smidgen.methods.token_map import TokenMap
from smidgen.sites.site import Site

if TYPE_CHECKING:
    from smidgen.methods.base import Method

Tensors = Mapping[str, Tensor]
At = TypeVar("At", bound=Site, contravariant=True)  # the type of the sites at which a method acts


@runtime_checkable
class EditsInput(Protocol[At]):
    """Changes what enters a module."""

    def before(self, p: Tensors, x: Tensor, site: At) -> Tensor:
        """The module's new input. x: (..., width_in)."""


@runtime_checkable
class EditsOutput(Protocol[At]):
    """Changes what leaves a module or a sublayer."""

    def after(self, p: Tensors, x: Tensor, y: Tensor, site: At) -> Tensor:
        """The module's new output. x: (..., width_in), y: (..., width_out)."""


@runtime_checkable
class ReadsWeight(Protocol[At]):
    """Changes what leaves a module, from the module's own tensors too."""

    def after_with(self, p: Tensors, x: Tensor, y: Tensor, base: Tensors, site: At) -> Tensor:
        """As `after`. base: as in `from_base`, with earlier edits folded in; its weight carries no gradient, its bias
        does."""


@runtime_checkable
class AddsKeys(Protocol[At]):
    """Adds keys and values to an attention."""

    def keys_values(self, p: Tensors, site: At) -> tuple[Tensor, Tensor]:
        """Keys (heads, length, head_dim) and values (heads, length, value_dim) that stand before those of the text."""


@runtime_checkable
class AddsTokens(Protocol[At]):
    """Adds vectors to a text."""

    def tokens(self, p: Tensors, site: At) -> Tensor:
        """Vectors (length, width_out) that stand among the embedded tokens of the input."""


@runtime_checkable
class EditsStates(Protocol[At]):
    """Changes the hidden states that leave a block."""

    def states(self, p: Tensors, x: Tensor, tokens: TokenMap, site: At) -> Tensor:
        """The new hidden states. x: (B, T, width)."""


@runtime_checkable
class ShortensText(Protocol[At]):
    """Lets the blocks above compute fewer tokens."""

    def shorten(self, p: Tensors, x: Tensor, tokens: TokenMap, site: At) -> tuple[Tensor, Tensor]:
        """The hidden states that go on, and where each token went.

        Args:
            x: (B, T, width).
            tokens: which of the text's tokens these are, and which are no padding.

        Returns:
            (B, S, width) with S <= T, and (B, T) int64 in [0, S): the place of each of the T. Every place has one.
        """


@runtime_checkable
class RunsBeside(Protocol[At]):
    """Is a network of its own that reads a stack's hidden states and takes the place of what leaves it."""

    def beside(self, p: Tensors, states: Sequence[Tensor], tokens: TokenMap, site: At) -> Tensor:
        """What leaves the stack, (B, T, width).

        Args:
            states: (B, T, width) each, without gradient: what entered the stack, then what left each block.
        """


@runtime_checkable
class Shares(Protocol[At]):
    """Has tensors above its sites; `group` says which share them, `shared_indices` which parts one uses."""

    def shared(self, sites: Sequence[At]) -> dict[str, Tensor]:
        """Fresh tensors that the sites of a group share, symbol -> tensor; `p` has them beside a site's own."""


@runtime_checkable
class StartsFromOriginal(Protocol[At]):
    """Starts from what a base lost when it was quantised; as `init` says where it was not."""

    def from_original(self, p: Tensors, base: Tensors, original: Tensor, site: At) -> dict[str, Tensor]:
        """The tensors of `init` as they start at a site.

        Args:
            base: as in `StartsFromBase`, the weight being the one that the codes stand for.
            original: the weight (width_out, width_in) that was quantised.
        """


@runtime_checkable
class StartsFromBase(Protocol[At]):
    """Starts from the tensors of the base."""

    def from_base(self, p: Tensors, base: Tensors, site: At) -> dict[str, Tensor]:
        """The tensors of `init` as they start at a site whose own tensors are `base`.

        base: "weight" (width_out, width_in) and, where there is one, "bias" (width_out,), in master precision. A
            convolution's weight has all inputs of a channel in one axis. What a port of another kind gives is said
            there.
        """


@runtime_checkable
class Grows(Protocol[At]):
    """Has tensors whose shapes change while it trains."""

    def due(self, step: int, total: int) -> bool:
        """Whether `event` follows optimiser step `step` (from 1) of `total`."""

    def event(
        self, step: int, total: int, sites: Sequence[At], parts: Sequence[Tensors], memory: Tensors
    ) -> tuple[Sequence[Tensors], Tensors]:
        """What the tensors of its sites go on as, which may be larger, and what to remember until the next event.

        Old values stay in the leading corner of a larger tensor: there the optimiser goes on with what it knows.
        `memory` is empty at first. Random numbers come from torch's global generator, seeded by run and step.
        """

    def grown(self, shapes: Mapping[str, tuple[int, ...]], site: At) -> bool:
        """Whether events can have led from the shapes of `init` to these."""


@runtime_checkable
class Penalises(Protocol[At]):
    """Adds something to the loss."""

    def penalty(self, parts: Sequence[Tensors], sites: Sequence[At]) -> Tensor | None:
        """A scalar that training adds to the loss, from the tensors of all sites; None for nothing."""


@runtime_checkable
class Joins(Protocol[At]):
    """Several results are one result of another method."""

    def joined(self, methods: Sequence[Method]) -> Method | None:
        """The method of which one result does what a weighted sum of these methods' does (self is first), if any."""

    def join(
        self, weights: Sequence[float], methods: Sequence[Method], parts: Sequence[Tensors], site: At
    ) -> dict[str, Tensor]:
        """The tensors of `joined(methods)`: what `methods` add with the tensors `parts`, times `weights`, added up."""


@runtime_checkable
class Merges(Protocol[At]):
    """Can be folded into a module's weight and bias; `unmergeable` names the sites where it cannot."""

    def merge(self, p: Tensors, weight: Tensor, bias: Tensor | None, site: At) -> tuple[Tensor, Tensor | None]:
        """The formula once more, folded. weight: (width_out, width_in), a norm's gain (width,); bias: or None.

        A convolution's weight is (width_out, width_in / groups * kernel size).
        """


@runtime_checkable
class Renews(Protocol):
    """Trains and saves some parameters whole, wherever they started."""

    def renews(self, name: str) -> bool:
        """Whether a parameter of this name is trained and saved whole.

        A delta's base may then have other values there: the fingerprint leaves it out, and a change of it is not known.
        """


CAPABILITIES: tuple[type, ...] = (
    EditsInput,
    EditsOutput,
    ReadsWeight,
    AddsKeys,
    AddsTokens,
    EditsStates,
    ShortensText,
    RunsBeside,
    Shares,
    StartsFromBase,
    StartsFromOriginal,
    Grows,
    Penalises,
    Joins,
    Merges,
    Renews,
)


def functions_of(capability: type) -> tuple[str, ...]:
    """Names of the functions of a protocol."""
    return tuple(name for name in vars(capability) if not name.startswith("_"))


def check_whole(cls: type) -> None:
    """Raises TypeError if a class has some functions of a capability and lacks others."""
    for capability in CAPABILITIES:
        names = functions_of(capability)
        missing = [name for name in names if not hasattr(cls, name)]
        if missing and len(missing) < len(names):
            has, lacking = set(names) - set(missing), ", ".join(f"{name}()" for name in missing)
            raise TypeError(f"{cls.__name__} defines {min(has)}() and lacks {lacking}; see {capability.__name__}")
