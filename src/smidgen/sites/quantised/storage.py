"""How a package stores the weight of a linear map in few bits: what the rest of the library asks of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from smidgen.common.errors import AttachError

Parts = Mapping[str, Tensor]


class WeightStorage(ABC):
    """Base of the ways to store a weight; each is one class, registered in `maps`.

    A module that it holds is called as an nn.Linear is, owns a parameter `weight` of whatever shape and dtype, and
    perhaps a `bias` of real numbers.

    Class attributes:
        keeps_input: whether a forward pass keeps the map's input for the backward pass.
        keeps_weight: whether it keeps the dequantised weight for it.
    """

    keeps_input: ClassVar[bool] = False
    keeps_weight: ClassVar[bool] = False

    @abstractmethod
    def holds(self, module: nn.Module) -> bool:
        """Whether a module's weight is stored so."""

    @abstractmethod
    def scheme(self, module: nn.Module) -> str:
        """What `smidgen.load(quantize=)` calls it: "nf4"."""

    @abstractmethod
    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(width_out, width_in) of the weight that the stored values stand for."""

    @abstractmethod
    def parts(self, module: nn.Module) -> Parts:
        """Name -> each tensor that the weight is made of: the codes, scales and tables."""

    @abstractmethod
    def dequantised(self, module: nn.Module) -> Tensor:
        """The weight that the map multiplies with, (width_out, width_in), in the dtype that the package gives."""

    def quantised(self, weight: Tensor, scheme: str) -> Parts | None:
        """The parts that a weight (width_out, width_in) of real numbers becomes; None for another storage's scheme."""
        return None

    def write(self, module: nn.Module, weight: Tensor) -> None:
        """Quantise another weight of this shape, with the settings of the one that is stored, and store it instead.

        Raises:
            AttachError: this storage cannot.
        """
        raise AttachError(f"a weight in {self.scheme(module)} cannot be quantised again")

    def bias_dtype(self, module: nn.Module) -> torch.dtype | None:
        """The dtype that the module casts its bias to, in place; None where it leaves it alone."""
        return None

    def share(self, module: nn.Module, memo: dict[int, object]) -> None:
        """Put into a deepcopy's memo what stands for the stored values in a copy that has them in common with this."""
        weight = module._parameters["weight"]
        assert weight is not None
        memo[id(weight)] = nn.Parameter(weight.detach(), requires_grad=False)

    def check(self, module: nn.Module) -> None:  # noqa: B027 - nothing, unless a storage needs it
        """Raises AttachError if the stored values are not those of the file any more."""

    def hold(self, module: nn.Module) -> object:
        """Let forward passes neither move the stored values nor lose a gradient; returns what `release` takes."""
        return None

    def release(self, module: nn.Module, held: object) -> None:  # noqa: B027 - nothing to give back
        """As it was before `hold`."""
