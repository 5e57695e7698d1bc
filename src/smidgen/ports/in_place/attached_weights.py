"""A module's weight and bias as they stand, chosen values put in."""

from __future__ import annotations

from torch import nn

from smidgen.common.dtypes import master_dtype
from smidgen.ports.in_place.sparse_values import current, own_tensor
from smidgen.sites.quantised.maps import own_weight
from smidgen.sites.weight_view import Pair


def stored(module: nn.Module) -> Pair:
    """A module's weight and bias in master precision, chosen values put in, without gradient."""
    weight, bias = live(module)
    return weight.detach(), None if bias is None else bias.detach()


def live(module: nn.Module) -> Pair:
    """The same, with gradient to what of them is trained."""
    weight = own_weight(module)
    if weight is None:
        weight = current(module, "weight").to(master_dtype(own_tensor(module, "weight").dtype))
    bias, dtype = module._parameters.get("bias"), weight.dtype
    return weight, None if bias is None else current(module, "bias").to(dtype)
