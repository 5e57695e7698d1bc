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
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface

from smidgen.common.dtypes import master_dtype
from smidgen.common.errors import AttachError
from smidgen.methods.capabilities import AddsKeys, Tensors
from smidgen.planning.row import Row
from smidgen.planning.rules.attention import KeyValueRules
from smidgen.ports.base import Port
from smidgen.ports.edit import Edit, Edits, edits_at
from smidgen.sites.site import Site

NAME = "smidgen"
CAUSAL = {"sdpa": True, "eager": False}  # whether no mask may mean a causal one


Function = Callable[..., Any]


class KeyValueEdit(Edit):
    """Keys and values that one method adds to an attention."""

    def keys_values(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B or 1, heads, length, head_dim) and values (.., value_dim) for keys (B, ...), in their dtype."""
        method = self.method
        assert isinstance(method, AddsKeys)  # the plan has seen to it

        def function(p: Tensors, *rows: Tensor) -> tuple[Tensor, Tensor]:
            k, v = method.keys_values(method.settle(p, self.site), self.site)
            return k.to(key.dtype)[None], v.to(key.dtype)[None]

        return self.by_row(function, master_dtype(key.dtype), key)


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
        count = sum(k.shape[2] for k, _ in found)
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


class AttentionPort(KeyValueRules, Port):
    """Attentions that ask transformers' AttentionInterface."""

    edit = KeyValueEdit

    def check(self, model: nn.Module, row: Row) -> None:
        """Raises AttachError if the attention cannot take more keys."""
        check_attention(model.get_submodule(row.site.path), row.site)

    def place(self, model: nn.Module, site: Site, key: str, edit: Edit) -> list[RemovableHandle]:
        """At the attention module, which gets a configuration of its own."""
        module: Any = model.get_submodule(site.path)
        if not edits_at(module, KeyValueEdits):
            module.add_module("edits", KeyValueEdits(module.config, *_looked_up(module)))
            module.config = copy.copy(module.config)
            module.config._attn_implementation_internal = NAME
        module.edits[key] = edit.train(module.training)
        return []

    def remove(self, model: nn.Module, site: Site) -> None:
        """Take all edits away; its own configuration comes back."""
        module: Any = model.get_submodule(site.path)
        if edits_at(module, KeyValueEdits):
            module.config = module.edits.config
            del module._modules["edits"]

    def why_no_rows(self, edit: Edit) -> str | None:
        """Each row has keys and values of its own."""
        return None


def _looked_up(module: nn.Module) -> tuple[AttentionInterface, Function | None]:
    """The interface that a module's forward asks, and the function that it asks for by default (there are several)."""
    forward = unwrap(type(module).forward)
    known = {name: forward.__globals__.get(name) for name in forward.__code__.co_names}
    eager = next((f for name, f in known.items() if name.endswith("eager_attention_forward")), None)
    return known["ALL_ATTENTION_FUNCTIONS"], eager


AttentionInterface.register(NAME, attend_with_added_keys)
