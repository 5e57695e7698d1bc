"""The attention port: keys and values that every query sees beside the text's own.

An edited attention module gets a copy of its configuration that names `attend` as its implementation, so that masks are
made as before and no other module notices. `attend` reads `module.edits` and hands on to the implementation that the
module's own configuration names: the model's masks are made for that one, after a switch as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from smidgen.common.errors import AttachError
from smidgen.ports.module_port import Edit, Edits
from smidgen.sites.site import Site

NAME = "smidgen"
CAUSAL = {"sdpa": True, "eager": False}  # whether no mask may mean a causal one


Function = Callable[..., Any]


class KeyValueEdits(Edits):
    """The edits at one attention module, the configuration that it had, and where its code looks up what to run."""

    def __init__(self, config: Any, interface: AttentionInterface, eager: Function | None) -> None:
        super().__init__()
        self.config, self.interface, self.eager = config, interface, eager

    def running(self) -> tuple[str, Function]:
        """The implementation that the model asks for now, by name, and its function."""
        name = self.config._attn_implementation
        return name, self.interface.get_interface(name, self.eager)  # type: ignore[arg-type]


def attend_with_added_keys(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: query (B, H, T, h), key and value (B, H_kv, S, h), mask (B, 1, T, S)."""
    edits = module.edits
    name, function = edits.running()
    found = [edit.keys_values(key) for edit in edits.values() if edit.enabled]
    if found:
        check_implementation(name, type(module).__name__)
        count = sum(k.shape[1] for k, _ in found)
        is_causal = kwargs.get("is_causal") if CAUSAL[name] else False
        attention_mask = _widened(module, query, key, attention_mask, count, is_causal)
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = _in_front(kwargs["position_bias"], count)
        key = torch.cat([*(_batched(k, key) for k, _ in found), key], dim=2)
        value = torch.cat([*(_batched(v, value) for _, v in found), value], dim=2)
    output: tuple[Tensor, Tensor | None] = function(module, query, key, value, attention_mask, **kwargs)
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
        if not (is_causal and rows > 1):
            return None
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()[None, None]
    return _in_front(mask, count)


def check_attention(module: Any, site: Site) -> None:
    """Raises AttachError, before anything is touched, if an attention module cannot take more keys."""
    check_implementation(module.config._attn_implementation, f"{type(module).__name__} at {site.name}")
    if getattr(module, "reorder_and_upcast_attn", False):
        raise AttachError(f"{type(module).__name__} at {site.name} has reorder_and_upcast_attn, which passes keys by")
    if hasattr(module, "edits"):
        raise AttachError(f"{type(module).__name__} at {site.name} already has an attribute 'edits'")


def check_implementation(name: str | None, place: str) -> None:
    """Raises AttachError if an implementation is one to which no keys can be added."""
    if name not in CAUSAL:
        raise AttachError(
            f"{place} runs {name!r}, to which no keys can be added; load the model with attn_implementation='sdpa' or "
            "'eager', or switch with model.set_attn_implementation('sdpa')"
        )


def add_keys(module: Any, key: str, edit: Edit) -> None:
    """Put an edit on an attention module, behind those that are there."""
    if not isinstance(getattr(module, "edits", None), KeyValueEdits):
        module.add_module("edits", KeyValueEdits(module.config, *_looked_up(module)))
        module.config = copy.copy(module.config)
        module.config._attn_implementation_internal = NAME
    edit.train(module.training)
    module.edits[key] = edit


def _looked_up(module: nn.Module) -> tuple[AttentionInterface, Function | None]:
    """The interface that a module's forward asks, and the function that it asks for by default (there are several)."""
    forward = unwrap(type(module).forward)
    known = {name: forward.__globals__.get(name) for name in forward.__code__.co_names}
    eager = next((f for name, f in known.items() if name.endswith("eager_attention_forward")), None)
    return known["ALL_ATTENTION_FUNCTIONS"], eager


def drop_keys(module: Any) -> None:
    """Take all edits off an attention module; its own configuration comes back."""
    module.config = module.edits.config
    del module._modules["edits"]


AttentionInterface.register(NAME, attend_with_added_keys)
