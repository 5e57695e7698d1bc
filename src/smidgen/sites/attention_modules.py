"""Attention modules: how many heads of which width, and whether keys can be added."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from inspect import unwrap
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from smidgen.sites.architectures import VALUE_DIMS
from smidgen.sites.roles import head_dim, within
from smidgen.sites.site import Site
from smidgen.sites.sublayers import SUBLAYERS


def find_heads(model: nn.Module, sites: Iterable[Site]) -> list[Site]:
    """Each module that hands keys and values to transformers' AttentionInterface, among all sites of a model.

    `kind` is "keys_values", `heads` and `head_dim` are those of a key, `roles` tell cross-attention from attention.
    """
    sites, found = list(sites), []
    for site in sites:
        path = interface_path(model, site.entry) if site.kind in SUBLAYERS[:2] else None
        if path is None:
            continue
        module: Any = model.get_submodule(path)
        width = next((s.width_out for s in sites if "value" in s.roles and within(s.path, path)), 0)
        size, value = head_dim(module), head_dim(module, VALUE_DIMS)
        heads = width // value if width and value else getattr(module.config, "num_attention_heads", 0)
        if heads and size:
            place = replace(site, path=path, kind="keys_values", entry="")
            found.append(replace(place, heads=heads, head_dim=size, value_dim=value))
    return found


def without_keys(model: nn.Module, sites: Iterable[Site]) -> list[Site]:
    """Attentions of a text's own stacks that compute without AttentionInterface, as `find_heads` has the others.

    A tower for images or sound may lack it (Donut's): the text goes by there.
    """
    lacking = [s for s in sites if s.kind in SUBLAYERS[:2] and interface_path(model, s.entry) is None]
    return [
        replace(site, kind="keys_values", entry="", path=site.entry) for site in lacking if _reads_text(model, site)
    ]


def _reads_text(model: nn.Module, site: Site) -> bool:
    """Whether the innermost model around a site has token ids as its first input."""
    path = site.path
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if isinstance(module, PreTrainedModel):
            return module.main_input_name in ("input_ids", "decoder_input_ids")
    return False


def no_interface(model: nn.Module, sites: Iterable[Site]) -> list[str]:
    """Class names of attention modules that compute without transformers' AttentionInterface."""
    lacking = (s for s in sites if s.kind in SUBLAYERS[:2] and interface_path(model, s.entry) is None)
    classes = (type(model.get_submodule(site.entry.rpartition(".")[0])).__name__ for site in lacking)
    return list(dict.fromkeys(classes))


def interface_path(model: nn.Module, entry: str) -> str | None:
    """The path of the innermost module around an attention's first map whose forward asks the interface."""
    path = entry.rpartition(".")[0]
    while path:
        forward = unwrap(type(model.get_submodule(path)).forward)
        if "ALL_ATTENTION_FUNCTIONS" in getattr(forward, "__code__", forward).co_names:
            return path
        path = path.rpartition(".")[0]
    return None
