"""Sublayers of the blocks as sites: from the linear map that one is entered by to the one that it is left by.

The last map's output is what the residual connection adds, before any norm, in every model of `LAYOUTS`; the modules
around it differ (BERT's hold the norm, BLOOM's the residual connection).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from smidgen.layouts import Layout, matching, widths
from smidgen.sites import Site, find_blocks

SUBLAYERS = ("attention", "cross_attention", "feed_forward")


def find_sublayers(model: nn.Module) -> list[Site]:
    """Each attention, cross-attention and feed-forward sublayer of the blocks, in order.

    `kind` is one of `SUBLAYERS`, `path` the map that the sublayer is left by, `entry` the one that it is entered by.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    found: list[Site] = []
    for stack, blocks in find_blocks(model).items():
        for layer, block in enumerate(blocks):
            for kind, entry, path in _spans(block, f"{paths[id(block)]}."):
                width_in, width_out = widths(model.get_submodule(entry))[0], widths(model.get_submodule(path))[1]
                place = (frozenset({"block"}), (), layer, len(blocks), stack, width_in, width_out)
                found.append(Site(path, kind, *place, entry=entry))
    return found


def _spans(block: nn.Module, root: str) -> Iterator[tuple[str, str, str]]:
    """Kind, first map and last map of each sublayer that a row of the table describes."""
    seen: set[str] = set()
    for layout, _ in matching(block):
        fused = tuple(part.path for part in layout.fused)
        first = (*layout.query, *layout.ff_in, *fused, *layout.mixed)
        last = (*layout.attention_out, *layout.ff_out)
        if first and last and last[0] not in seen:
            seen.add(last[0])
            yield _kind(layout), root + first[0], root + last[0]


def _kind(layout: Layout) -> str:
    if layout.ff_out:
        return "feed_forward"
    return "cross_attention" if "cross" in layout.name else "attention"
