"""The attention port: keys and values that every query sees beside the text's own.

An edited attention module gets a copy of its configuration that names `attend` as its implementation, so that masks are
made as before and no other module notices. `attend` reads `module.edits` and hands on to what the module ran before.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from smidgen.errors import AttachError
from smidgen.ports import Edit, Edits
from smidgen.sites import Site

NAME = "smidgen"
CAUSAL = {"sdpa": True, "eager": False}  # whether no mask may mean a causal one


class KeyValueEdits(Edits):
    """The edits at one attention module, and the function that it ran before."""

    def __init__(self, function: Callable[..., Any], implementation: str) -> None:
        super().__init__()
        self.function, self.causal = function, CAUSAL[implementation]


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: query (B, H, T, h), key and value (B, H_kv, S, h), mask (B, 1, T, S)."""
    edits = module.edits
    found = [edit.keys_values(key) for edit in edits.values() if edit.enabled]
    if found:
        count = sum(k.shape[1] for k, _ in found)
        attention_mask = _widened(module, query, key, attention_mask, count, kwargs.get("is_causal"))
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = _in_front(kwargs["position_bias"], count)
        key = torch.cat([*(_batched(k, key) for k, _ in found), key], dim=2)
        value = torch.cat([*(_batched(v, value) for _, v in found), value], dim=2)
    output: tuple[Tensor, Tensor | None] = edits.function(module, query, key, value, attention_mask, **kwargs)
    return output


def _batched(x: Tensor, like: Tensor) -> Tensor:
    return x.expand(len(like), -1, -1, -1)


def _in_front(mask: Tensor, count: int) -> Tensor:
    """A mask or bias (..., S) -> (..., count + S) that lets the new places through."""
    passes = mask.new_full((*mask.shape[:-1], count), mask.dtype == torch.bool)
    return torch.cat((passes, mask), dim=-1)


def _widened(
    module: Any, query: Tensor, key: Tensor, mask: Tensor | None, count: int, is_causal: bool | None
) -> Tensor | None:
    """The mask with the new places let through; one that was implied is written out."""
    if mask is None:
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        rows, columns = query.shape[2], key.shape[2]
        if not (module.edits.causal and is_causal and rows > 1):
            return None
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()[None, None]
    return _in_front(mask, count)


def check_attention(module: Any, site: Site) -> None:
    """Raises AttachError, before anything is touched, if an attention module cannot take more keys."""
    name = module.config._attn_implementation
    if name not in CAUSAL:
        raise AttachError(
            f"{type(module).__name__} at {site.name} runs {name!r}, to which no keys can be added; load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )
    if getattr(module, "reorder_and_upcast_attn", False):
        raise AttachError(f"{type(module).__name__} at {site.name} has reorder_and_upcast_attn, which passes keys by")
    if hasattr(module, "edits"):
        raise AttachError(f"{type(module).__name__} at {site.name} already has an attribute 'edits'")


def add_keys(module: Any, key: str, edit: Edit) -> None:
    """Put an edit on an attention module, behind those that are there."""
    if not isinstance(getattr(module, "edits", None), KeyValueEdits):
        name = module.config._attn_implementation
        code = sys.modules[unwrapped(type(module)).__module__]
        function = code.ALL_ATTENTION_FUNCTIONS.get_interface(name, code.eager_attention_forward)
        module.add_module("edits", KeyValueEdits(function, name))
        module._own_config, module.config = module.config, copy.copy(module.config)
        module.config._attn_implementation_internal = NAME
    edit.train(module.training)
    module.edits[key] = edit


def unwrapped(cls: type) -> type:
    """The class in a module's order of resolution that defines its forward."""
    return next(base for base in cls.__mro__ if "forward" in vars(base))


def drop_keys(module: Any) -> None:
    """Take all edits off an attention module; its own configuration comes back."""
    module.config = module.__dict__.pop("_own_config")
    del module._modules["edits"]


AttentionInterface.register(NAME, attend)
