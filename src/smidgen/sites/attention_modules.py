"""Attention modules: how many heads of which width, and whether keys can be added."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import unwrap

from torch import nn
from transformers import PreTrainedModel

from smidgen.sites.architectures import VALUE_DIMS
from smidgen.sites.roles import head_dim, within
from smidgen.sites.site import AttentionSublayer, CrossAttentionSublayer, KeyValueSite, OwnerSite, Site

Attentions = AttentionSublayer | CrossAttentionSublayer


def find_heads(model: nn.Module, sites: Iterable[Site]) -> list[KeyValueSite]:
    """Each module that hands keys and values to transformers' AttentionInterface, among all sites of a model.

    `roles` tell cross-attention from attention.
    """
    sites, found = list(sites), []
    for site in _attentions(sites):
        path = interface_path(model, site.entry)
        if path is None:
            continue
        module: nn.Module = model.get_submodule(path)
        width = next((s.width_out for s in _owners(sites) if "value" in s.roles and within(s.path, path)), 0)
        size, value = head_dim(module), head_dim(module, VALUE_DIMS)
        heads = width // value if width and value else getattr(module.config, "num_attention_heads", 0)
        if heads and size:
            found.append(KeyValueSite.beside(site, path=path, heads=heads, head_dim=size, value_dim=value))
    return found


def _attentions(sites: Iterable[Site]) -> list[Attentions]:
    return [site for site in sites if isinstance(site, Attentions)]


def _owners(sites: Iterable[Site]) -> list[OwnerSite]:
    return [site for site in sites if isinstance(site, OwnerSite)]


def without_keys(model: nn.Module, sites: Iterable[Site]) -> list[KeyValueSite]:
    """Attentions of a text's own stacks that compute without AttentionInterface, as `find_heads` has the others.

    A tower for images or sound may lack it (Donut's): the text goes by there.
    """
    lacking = [site for site in _attentions(sites) if interface_path(model, site.entry) is None]
    return [KeyValueSite.beside(site, path=site.entry) for site in lacking if _reads_text(model, site)]


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
    lacking = (site for site in _attentions(sites) if interface_path(model, site.entry) is None)
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
