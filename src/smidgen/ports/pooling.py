"""Pooling of a sequence classifier other than its own: one hook on the base model."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.hook_types import Args, Kwargs, Output


def place_pooling(model: nn.Module, pooling: str) -> RemovableHandle:
    """Hook the base model so that its output carries the pooled vector at every position."""
    base = model.base_model
    assert isinstance(base, nn.Module)
    return base.register_forward_hook(partial(pool_output, pooling), with_kwargs=True)


def pool_output(pooling: str, base: nn.Module, args: Args, kwargs: Kwargs, output: Output) -> object:
    """Forward hook: last_hidden_state (B, T, d) -> its pooled vector (B, d), repeated over T."""
    hidden = output[0]
    pooled = pool(hidden, kwargs.get("attention_mask"), pooling)
    return with_pooled(output, pooled[:, None, :].expand_as(hidden), pooled)


def own_pooled(output: Output) -> Tensor | None:
    """The vector (B, d) that a base model itself makes of each text, if it makes one."""
    found = (*output[1:2], None)[0] if isinstance(output, tuple) else output.get("pooler_output")
    return found if isinstance(found, Tensor) and found.ndim == 2 else None


def with_pooled(output: Output, states: Tensor, pooled: Tensor | None) -> object:
    """A base model's output with other states (B, T, d), and with another vector (B, d) where it had one."""
    had = own_pooled(output) is not None
    if isinstance(output, tuple):
        return (states, pooled, *output[2:]) if had else (states, *output[1:])
    output["last_hidden_state"] = states
    if had:
        output["pooler_output"] = pooled
    return output


def pool(hidden: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Pool hidden states (B, T, d) over the tokens that mask (B, T) keeps: "first", "mean" or "last" -> (B, d)."""
    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    if pooling == "mean":
        weight = mask.to(hidden.dtype)[..., None]  # (B, T, 1)
        return (hidden * weight).sum(1) / weight.sum(1)
    place = torch.arange(mask.shape[1], device=mask.device)
    kept = mask.bool()
    if pooling == "last":
        index = torch.where(kept, place, -1).amax(1)
    else:
        index = torch.where(kept, place, mask.shape[1]).amin(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), index]
