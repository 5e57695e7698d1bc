"""Sublayers of the blocks as sites: from the linear map that one is entered by to the one that it is left by.

The last map's output is what the residual connection adds, before any norm, in every model of `LAYOUTS`; the modules
around it differ (BERT's hold the norm, BLOOM's the residual connection).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from inspect import unwrap
from typing import Any

from torch import nn

from smidgen.errors import PlanError
from smidgen.kinds import is_norm, widths
from smidgen.layouts import Layout, matching, within
from smidgen.sites import Site, find_blocks

HEAD_DIMS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
SUBLAYERS = ("attention", "cross_attention", "feed_forward")
UNKNOWN = "the layout of its blocks is not known; methods for norms work, and target= with endings of module paths"


def check_sublayers(method: str, names: Sequence[str], sites: Sequence[Site]) -> None:
    """Raise PlanError unless the model has each of these sublayers."""
    known = list(dict.fromkeys(site.kind for site in sites if site.kind in SUBLAYERS))
    missing = next((name for name in names if name not in known), None)
    if missing:
        has = ", ".join(known) or f"none: {UNKNOWN}"
        raise PlanError(f"{method}: site names {missing!r}, which is not found in this model; it has {has}")


def find_sublayers(model: nn.Module) -> list[Site]:
    """Each attention, cross-attention and feed-forward sublayer of the blocks, in order.

    `kind` is one of `SUBLAYERS`, `path` the map that the sublayer is left by, `entry` the one that it is entered by. A
    mixture of experts, whose maps are no modules, is one module with its router: both paths are that.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    found: list[Site] = []
    for stack, blocks in find_blocks(model).items():
        for layer, block in enumerate(blocks):
            spans = list(_spans(block))
            dense = any(kind == "feed_forward" for kind, _, _ in spans)
            for kind, entry, path in spans if dense else (*spans, *_experts(block)):
                place = (frozenset({"block", kind}), (), layer, len(blocks), stack, *_widths(block, entry, path))
                root = f"{paths[id(block)]}."
                found.append(Site(root + path, kind, *place, entry=root + entry))
    return found


def _widths(block: nn.Module, entry: str, path: str) -> tuple[int, int]:
    """Of what enters and what leaves; the block's own, as its norms have it, where the two are one module."""
    if entry != path:
        return widths(block.get_submodule(entry))[0], widths(block.get_submodule(path))[1]
    return next((widths(child) for child in block.children() if is_norm(child)), (0, 0))


def _experts(block: nn.Module) -> Iterator[tuple[str, str, str]]:
    """The children of a block that hold experts stacked in 3-D parameters."""
    for name, child in block.named_children():
        leaves = (m for m in child.modules() if not isinstance(m, nn.modules.conv._ConvNd))
        if any(p.ndim == 3 for leaf in leaves for p in leaf.parameters(recurse=False)):
            yield "feed_forward", name, name


def find_heads(model: nn.Module, sites: Iterable[Site]) -> list[Site]:
    """Each module that hands keys and values to transformers' AttentionInterface, among all sites of a model.

    `kind` is "keys_values", `heads` and `head_dim` are those of a key, `roles` tell cross-attention from attention.
    """
    sites, found = list(sites), []
    for site in sites:
        path = _interface(model, site.entry) if site.kind in SUBLAYERS[:2] else None
        if path is None:
            continue
        module: Any = model.get_submodule(path)
        width = next((s.width_out for s in sites if "key" in s.roles and within(s.path, path)), 0)
        size = next((getattr(module, name) for name in HEAD_DIMS if getattr(module, name, 0)), 0)
        # projections with rows mixed by head have no key site
        heads = width // size if width and size else getattr(module.config, "num_attention_heads", 0)
        if heads and size:
            found.append(replace(site, path=path, kind="keys_values", entry="", heads=heads, head_dim=size))
    return found


def no_interface(model: nn.Module, sites: Iterable[Site]) -> list[str]:
    """Class names of attention modules that compute without transformers' AttentionInterface."""
    lacking = (s for s in sites if s.kind in SUBLAYERS[:2] and _interface(model, s.entry) is None)
    classes = (type(model.get_submodule(site.entry.rpartition(".")[0])).__name__ for site in lacking)
    return list(dict.fromkeys(classes))


def _interface(model: nn.Module, entry: str) -> str | None:
    """The path of the innermost module around an attention's first map whose forward asks the interface."""
    path = entry.rpartition(".")[0]
    while path:
        forward = unwrap(type(model.get_submodule(path)).forward)
        if "ALL_ATTENTION_FUNCTIONS" in getattr(forward, "__code__", forward).co_names:
            return path
        path = path.rpartition(".")[0]
    return None


def _spans(block: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Kind, first map and last map of each sublayer that a row of the table describes."""
    seen: set[str] = set()
    for layout, _ in matching(block):
        fused = tuple(part.path for part in layout.fused)
        first = (*layout.query, *layout.ff_in, *fused, *layout.mixed)
        last = (*layout.attention_out, *layout.ff_out)
        if first and last and last[0] not in seen:
            seen.add(last[0])
            yield _kind(layout), first[0], last[0]


def _kind(layout: Layout) -> str:
    if layout.ff_out:
        return "feed_forward"
    return "cross_attention" if "cross" in layout.name else "attention"
