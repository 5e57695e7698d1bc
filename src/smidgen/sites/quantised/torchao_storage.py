"""torchao: an nn.Linear whose weight is a tensor of a class of its own, of codes and scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smidgen.common.errors import AttachError
from smidgen.sites.quantised.storage import Parts, WeightStorage

GROUP = 32  # values of torchao's int4 that share a scale


class TensorSubclass(WeightStorage):
    """Weight-only codes of 8 or 4 bits: the weight has its shape and the base's dtype, and holds neither."""

    keeps_input = False
    keeps_weight = True  # torch differentiates the product with the dequantised weight

    def holds(self, module: nn.Module) -> bool:
        """Told by the class of the weight."""
        weight = module._parameters.get("weight")
        return isinstance(module, nn.Linear) and weight is not None and is_torchao(weight)

    def scheme(self, module: nn.Module) -> str:
        """torchao-int8, torchao-int4, or the name of the class for what `smidgen.load` does not make."""
        weight = self._weight(module)
        name = type(weight).__name__
        if name == "Int8Tensor":
            return "torchao-int8"
        narrow = getattr(weight, "target_dtype", None) is getattr(torch, "int4", None)
        return "torchao-int4" if name.startswith("Int4") or narrow else f"torchao-{name}"

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """As torch says."""
        rows, columns = self._weight(module).shape
        return int(rows), int(columns)

    def parts(self, module: nn.Module) -> Parts:
        """What torch finds inside, by name."""
        return _inside(self._weight(module).detach())

    def dequantised(self, module: nn.Module) -> Tensor:
        """In the dtype that the weight says it has."""
        found: Tensor = self._weight(module).detach().dequantize()
        return found

    def quantised(self, weight: Tensor, scheme: str) -> Parts | None:
        """A scale for each row of 8 bits, or for each 32 values of 4."""
        if scheme not in ("torchao-int8", "torchao-int4"):
            return None
        from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor
        from torchao.quantization.granularity import PerRow

        if scheme == "torchao-int8":
            return _inside(Int8Tensor.from_hp(weight, PerRow()))
        return _inside(IntxUnpackedToInt8Tensor.from_hp(weight, (1, GROUP), vars(torch)["int4"]))

    def write(self, module: nn.Module, weight: Tensor) -> None:
        """The scheme's own quantiser, into the tensors that stand there."""
        stored, scheme = self._weight(module), self.scheme(module)
        parts = self.quantised(weight.detach().to(stored.device, stored.dtype), scheme) or {}
        old = self.parts(module)
        if {name: part.shape for name, part in parts.items()} != {name: part.shape for name, part in old.items()}:
            raise AttachError(f"a weight in {scheme} of this form cannot be quantised again; load it with smidgen.load")
        for name, part in parts.items():
            old[name].copy_(part)

    def _weight(self, module: nn.Module) -> Any:
        return module._parameters["weight"]


def is_torchao(tensor: Tensor) -> bool:
    """Whether a tensor is of a class of torchao, wherever its class is defined there."""
    if type(tensor) in (Tensor, nn.Parameter):  # nearly all, and what torch.compile can follow
        return False
    return any(cls.__module__.partition(".")[0] == "torchao" for cls in type(tensor).__mro__)


def _inside(tensor: Any, prefix: str = "") -> dict[str, Tensor]:
    """Name -> plain tensor that a tensor of a class of its own is made of."""
    found: dict[str, Tensor] = {}
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        nested = hasattr(part, "__tensor_flatten__") and type(part) is not Tensor
        found |= _inside(part, f"{prefix}{name}.") if nested else {prefix + name: part}
    return found
