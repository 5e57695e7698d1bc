"""A quantised map without content: what it stores and what its passes take, for counting bytes and FLOPs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen.sites.quantised.storage import Parts, WeightStorage


class CountedMap(nn.Linear):
    """Stands in for a quantised map: tensors of the sizes of its parts, the dequantised weight made when it is used."""

    def __init__(self, module: nn.Module, storage: WeightStorage) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = storage.shape(module)
        self.stored_scheme = storage.scheme(module)
        self.keeps = (storage.keeps_input, storage.keeps_weight)
        parts = {name: torch.empty(part.shape, dtype=part.dtype) for name, part in storage.parts(module).items()}
        first, *rest = parts
        self.weight = nn.Parameter(parts[first], requires_grad=False)
        self.stored_parts = rest
        for name in rest:
            self.register_buffer(f"part_{name.replace('.', '_')}", parts[name], persistent=False)
        bias = module._parameters.get("bias")
        fake = None if bias is None else torch.empty(bias.shape, dtype=bias.dtype)
        self.register_parameter("bias", None if fake is None else nn.Parameter(fake, requires_grad=False))

    def forward(self, input: Tensor) -> Tensor:
        """W x + b with a weight that is made for the call."""
        product: Tensor = CountedProduct.apply(input, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product.dtype)


class CountedProduct(torch.autograd.Function):
    """W x, with what the real map keeps for the backward pass, and W made again in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: CountedMap) -> Tensor:
        """The product, and what is kept of it."""
        weight = torch.empty(module.out_features, module.in_features, dtype=x.dtype)
        ctx.module = module
        ctx.save_for_backward(*(t for t, kept in zip((x, weight), module.keeps, strict=True) if kept))
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradient of x."""
        module = ctx.module
        weight = torch.empty(module.out_features, module.in_features, dtype=grads[0].dtype)
        return grads[0] @ weight, None


class Counted(WeightStorage):
    """The storage of such a map."""

    def holds(self, module: nn.Module) -> bool:
        """Told by its class."""
        return isinstance(module, CountedMap)

    def scheme(self, module: nn.Module) -> str:
        """That of the map it stands for."""
        assert isinstance(module, CountedMap)
        return module.stored_scheme

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(width_out, width_in)."""
        assert isinstance(module, CountedMap)
        return module.out_features, module.in_features

    def parts(self, module: nn.Module) -> Parts:
        """Tensors of the sizes of the parts."""
        assert isinstance(module, CountedMap)
        rest = {name: module.get_buffer(f"part_{name.replace('.', '_')}") for name in module.stored_parts}
        return {"codes": module.weight, **rest}

    def dequantised(self, module: nn.Module) -> Tensor:
        """Of the right shape, and no values."""
        return torch.empty(self.shape(module))
