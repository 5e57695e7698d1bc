"""Heads and poolings, row by row. Heads of different widths stand side by side, the narrower ones filled with zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen.common.hook_types import Args, Kwargs, Output
from smidgen.ports.forward_state import state
from smidgen.ports.pooling import own_pooled, pool, with_pooled


def padded(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors that differ in their first size alone as one, (n, largest, ...), zeros behind the smaller ones."""
    largest = max(len(tensor) for tensor in tensors)
    found = tensors[0].new_zeros((len(tensors), largest, *tensors[0].shape[1:]))
    for row, tensor in zip(found, tensors, strict=True):
        row[: len(tensor)] = tensor
    return found


def head_by_row(path: str, module: nn.Linear, args: Args, output: Tensor) -> Tensor:
    """Forward hook of a linear map of the head: W_row x + b_row, x of (B, ..., width_in).

    The output is as wide as the widest row's.
    """
    mix = state().mixed()
    weight, bias = mix.heads.get(f"{path}.weight"), mix.heads.get(f"{path}.bias")
    if weight is None and bias is None:
        return output
    x: Tensor = args[0]
    mix.check(x, path)
    y = F.linear(x, module.weight) if weight is None else torch.einsum("b...i,boi->b...o", x, weight.to(x.dtype))
    if bias is None:
        return y if module.bias is None else y + module.bias
    return y + bias.to(x.dtype).view(len(bias), *[1] * (y.ndim - 2), -1)


def pool_by_row(base: nn.Module, args: Args, kwargs: Kwargs, output: Output) -> object:
    """Forward hook of the base model: last_hidden_state (B, T, d) of rows with a pooling is the pooled vector (B, d),
    repeated over T."""
    poolings: Mapping[str, Tensor] = state().mixed().poolings
    if not poolings:
        return None
    states, own, mask = output[0].clone(), own_pooled(output), kwargs.get("attention_mask")
    own = None if own is None else own.clone()
    for pooling, rows in poolings.items():
        pooled = pool(states[rows], None if mask is None else mask[rows], pooling)
        states[rows] = pooled[:, None, :].expand(-1, states.shape[1], -1)
        if own is not None:
            own[rows] = pooled
    return with_pooled(output, states, own)
