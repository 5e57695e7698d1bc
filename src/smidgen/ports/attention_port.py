"""The attention port: keys and values that every query sees beside the text's own.

An edited attention module gets a copy of its configuration that names `attend` as its implementation, so that masks are
made as before and no other module notices. `attend` reads `module.edits` and hands on to the implementation that the
module's own configuration names: the model's masks are made for that one, after a switch as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import unwrap
from typing import TypedDict, TypeVar, Unpack, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedConfig

from smidgen.common.dtypes import master_dtype
from smidgen.common.errors import AttachError
from smidgen.methods.capabilities import AddsKeys, Tensors
from smidgen.planning.entry import Entry
from smidgen.planning.rules.attention import KeyValueRules
from smidgen.ports.base import Port
from smidgen.ports.by_row.layouts import Layouts
from smidgen.ports.edit import Edit, EditedModule, Edits, edits_of, put_edit
from smidgen.ports.forward_state import state
from smidgen.sites.site import Site

NAME = "smidgen"
CAUSAL = {"sdpa": True, "eager": False}  # whether no mask may mean a causal one


Function = Callable[..., tuple[Tensor, Tensor | None]]


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


@dataclass(frozen=True)
class AddedKeys:
    """Keys (B, H_kv, n, h) and values (.., value_dim) to stand before the text's, and which of them a row has.

    Attributes:
        there: (B, n), None if every row has all of them.
    """

    keys: Tensor
    values: Tensor
    there: Tensor | None = None


class KeyValueEdits(Edits[KeyValueEdit]):
    """The edits at one attention module, the configuration that it had, and where its code looks up what to run."""

    def __init__(self, config: PreTrainedConfig, interface: AttentionInterface, eager: Function | None) -> None:
        super().__init__()
        self.config, self.interface, self.eager = config, interface, eager

    def added(self, key: Tensor) -> AddedKeys | None:
        """What the edits that are on add for keys (B, H_kv, S, h); None if there is nothing."""
        found = [edit.keys_values(key) for edit in self.all() if edit.enabled]
        if not found:
            return None
        keys, values = (torch.cat(part, dim=2) for part in zip(*found, strict=True))
        return AddedKeys(_batched(keys, key), _batched(values, key))

    def running(self) -> tuple[str, Function]:
        """The implementation that the model asks for now, by name, and its function."""
        name = self.config._attn_implementation
        return name, self.interface.get_interface(name, self.eager)  # type: ignore[arg-type]


class KeyValueLayouts(Layouts[KeyValueEdits], KeyValueEdits):
    """Layout -> its edits at one attention module; each row of a mixed batch has its own keys."""

    def fresh(self) -> KeyValueEdits:
        """An empty place at the same attention."""
        return KeyValueEdits(self.config, self.interface, self.eager)

    def added(self, key: Tensor) -> AddedKeys | None:
        """What each row's layout adds, right before the text; places in front stay empty where it adds less."""
        now = state()
        mix = now.mixed()
        found: list[AddedKeys | None] = []
        for block in mix.blocks:
            edits = self.of(block.layout)
            if edits is None:
                found.append(None)
                continue
            mix.check(key, f"an attention with {block.layout}")
            with now.on(block):
                found.append(edits.added(key[block.rows]))
        longest = max((each.keys.shape[2] for each in found if each is not None), default=0)
        return None if not longest else _side_by_side(found, [block.size for block in mix.blocks], longest)


def _side_by_side(found: Sequence[AddedKeys | None], sizes: Sequence[int], longest: int) -> AddedKeys:
    """One AddedKeys of several blocks of rows, each filled up to the longest in front."""
    some = next(each for each in found if each is not None)
    keys, values, there = list[Tensor](), list[Tensor](), list[Tensor]()
    for each, size in zip(found, sizes, strict=True):
        count = 0 if each is None else each.keys.shape[2]
        for parts, like in ((keys, some.keys), (values, some.values)):
            parts.append(like.new_zeros((size, like.shape[1], longest - count, like.shape[3])))
        if each is not None:
            keys[-1] = torch.cat([keys[-1], each.keys], dim=2)
            values[-1] = torch.cat([values[-1], each.values], dim=2)
        places = torch.arange(longest, device=some.keys.device) >= longest - count
        there.append(places.expand(size, -1))
    shown = torch.cat(there)
    return AddedKeys(torch.cat(keys), torch.cat(values), None if bool(shown.all()) else shown)


class AlsoGiven(TypedDict, total=False):
    """What an attention function may be given beside, as far as it is read here."""

    is_causal: bool | None
    position_bias: Tensor | None


def attend_with_added_keys(
    module: EditedModule[KeyValueEdits],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Unpack[AlsoGiven],
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: query (B, H, T, h), key and value (B, H_kv, S, h), mask (B, 1, T, S)."""
    edits = module.edits
    name, function = edits.running()
    added = edits.added(key)
    if added is not None:
        check_implementation(name, type(module).__name__)
        count = added.keys.shape[2]
        is_causal = kwargs.get("is_causal") if CAUSAL[name] else False
        attention_mask = _widened(module, query, key, attention_mask, count, is_causal)
        if added.there is not None:
            attention_mask = _closed(attention_mask, added.there, query, key.shape[2], as_bool=CAUSAL[name])
        if (bias := kwargs.get("position_bias")) is not None:
            kwargs["position_bias"] = _in_front(bias, count)
        key = torch.cat([added.keys, key], dim=2)
        value = torch.cat([added.values, value], dim=2)
    return function(module, query, key, value, attention_mask, **kwargs)


def _batched(x: Tensor, like: Tensor) -> Tensor:
    return x.expand(len(like), -1, -1, -1)


def _in_front(mask: Tensor, count: int) -> Tensor:
    """A mask or bias (..., S) -> (..., count + S) that lets the new places through."""
    passes = mask.new_full((*mask.shape[:-1], count), mask.dtype == torch.bool)
    return torch.cat((passes, mask), dim=-1)


def _widened(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, count: int, is_causal: bool | None
) -> Tensor | None:
    """The mask with the new places let through; one that was implied is written out."""
    if mask is None:
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        rows, columns = query.shape[2], key.shape[2]
        if not (is_causal and rows > 1):
            return None
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()[None, None]
    return _in_front(mask, count)


def _closed(mask: Tensor | None, there: Tensor, query: Tensor, text: int, as_bool: bool) -> Tensor:
    """A mask (B or 1, 1, T or 1, n + S) that hides the new places (B, n) which a row has not got.

    Args:
        mask: with the new places let through; None lets all through.
        text: S, number of the text's keys.
        as_bool: of a mask that is made here: whether the implementation takes one of bool, else numbers to add.
    """
    if mask is None:
        dtype = torch.bool if as_bool else query.dtype
        shape = (len(there), 1, 1, there.shape[1] + text)
        mask = torch.ones(shape, dtype=dtype) if as_bool else torch.zeros(shape, dtype=dtype)
        mask = mask.to(query.device)
    mask = mask.expand(len(there), -1, -1, -1).clone()
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    mask[..., : there.shape[1]].masked_fill_(~there[:, None, None, :], hidden)
    return mask


class AttentionModule(nn.Module):
    """An attention of transformers, which asks its configuration what to run."""

    config: PreTrainedConfig


def attention_at(model: nn.Module, site: Site) -> AttentionModule:
    """The attention of a site."""
    return cast(AttentionModule, model.get_submodule(site.path))


def check_attention(module: AttentionModule, site: Site) -> None:
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


AnyKeyValueEdits = TypeVar("AnyKeyValueEdits", bound=KeyValueEdits)


def _take_over(module: AttentionModule, cls: type[AnyKeyValueEdits]) -> AnyKeyValueEdits:
    """Give an attention module an empty place for edits, and a configuration of its own that has them asked."""
    edits = cls(module.config, *_looked_up(module))
    module.add_module("edits", edits)
    module.config = copy.copy(module.config)
    module.config._attn_implementation_internal = NAME
    return edits


class AttentionPort(KeyValueRules, Port):
    """Attentions that ask transformers' AttentionInterface."""

    edit = KeyValueEdit

    def check(self, model: nn.Module, entry: Entry) -> None:
        """Raises AttachError if the attention cannot take more keys."""
        check_attention(attention_at(model, entry.site), entry.site)

    def place(self, model: nn.Module, site: Site, key: str, edit: Edit) -> list[RemovableHandle]:
        """At the attention module, which gets a configuration of its own."""
        module = attention_at(model, site)
        if edits_of(module, KeyValueEdits) is None:
            _take_over(module, KeyValueEdits)
        put_edit(module, key, edit)
        return []

    def remove(self, model: nn.Module, site: Site) -> None:
        """Take all edits away; its own configuration comes back."""
        module = attention_at(model, site)
        edits = edits_of(module, KeyValueEdits)
        if edits is not None:
            module.config = edits.config
            del module._modules["edits"]

    def why_no_rows(self, edit: Edit) -> str | None:
        """Each row has keys and values of its own."""
        return None

    def place_layout(self, model: nn.Module, site: Site, layout: str, key: str, edit: Edit) -> list[RemovableHandle]:
        """At the attention module; a row that has fewer keys than others does not see the places in front."""
        module = attention_at(model, site)
        edits = edits_of(module, KeyValueLayouts)
        if edits is None:
            edits = _take_over(module, KeyValueLayouts)
        edits.add(layout, key, edit)
        return []

    def remove_layout(self, model: nn.Module, site: Site, layout: str) -> None:
        """Take a layout's edits away; with the last one the module's own configuration comes back."""
        edits = edits_of(model.get_submodule(site.path), KeyValueLayouts)
        if edits is not None:
            edits.drop(layout)
            if not len(edits):
                self.remove(model, site)


def _looked_up(module: nn.Module) -> tuple[AttentionInterface, Function | None]:
    """The interface that a module's forward asks, and the function that it asks for by default (there are several)."""
    forward = unwrap(type(module).forward)
    known = {name: forward.__globals__.get(name) for name in forward.__code__.co_names}
    eager = next((f for name, f in known.items() if name.endswith("eager_attention_forward")), None)
    return known["ALL_ATTENTION_FUNCTIONS"], eager


AttentionInterface.register(NAME, attend_with_added_keys)
