"""torchao: an nn.Linear whose weight is a tensor of a class of its own, of codes and scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smidgen.sites.quantised.storage import Parts, WeightStorage


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

    def write(self, module: nn.Module, weight: Tensor) -> None:
        """By the class's own quantiser, with the block size that stands there."""
        stored = self._weight(module)
        fresh = weight.detach().to(stored.device, stored.dtype)
        cls: Any = type(stored)
        if cls.__name__ == "Int8Tensor":
            granularity = _module("torchao.quantization.granularity")
            per_row = stored.block_size[-1] == stored.shape[-1]
            made = cls.from_hp(fresh, granularity.PerRow() if per_row else granularity.PerGroup(stored.block_size[-1]))
        else:
            mapping = _module("torchao.quantization.quant_primitives").MappingType
            symmetric = not bool(stored.zero_point.any())
            kind = mapping.SYMMETRIC if symmetric else mapping.ASYMMETRIC
            made = cls.from_hp(fresh, tuple(stored.block_size), stored.target_dtype, mapping_type=kind)
        for name, part in _inside(made).items():
            _inside(stored.detach())[name].copy_(part)

    def _weight(self, module: nn.Module) -> Any:
        return module._parameters["weight"]


def is_torchao(tensor: Tensor) -> bool:
    """Whether a tensor is of a class of torchao, wherever its class is defined there."""
    return any(cls.__module__.partition(".")[0] == "torchao" for cls in type(tensor).__mro__)


def _module(name: str) -> Any:
    import importlib

    return importlib.import_module(name)


def _inside(tensor: Any, prefix: str = "") -> dict[str, Tensor]:
    """Name -> plain tensor that a tensor of a class of its own is made of."""
    found: dict[str, Tensor] = {}
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        nested = hasattr(part, "__tensor_flatten__") and type(part) is not Tensor
        found |= _inside(part, f"{prefix}{name}.") if nested else {prefix + name: part}
    return found
