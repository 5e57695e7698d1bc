"""Sublayers of the blocks as sites: from the linear map that one is entered by to the one that it is left by.

The last map's output is what the residual connection adds, before any norm, in every model of `LAYOUTS`; the modules
around it differ (BERT's hold the norm, BLOOM's the residual connection).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from smidgen.common.errors import PlanError
from smidgen.sites.architectures import Layout
from smidgen.sites.discovery import find_blocks, loose_parts
from smidgen.sites.module_kinds import widths
from smidgen.sites.quantised.maps import own_shapes
from smidgen.sites.roles import matching, within
from smidgen.sites.site import AttentionSublayer, CrossAttentionSublayer, FeedForwardSublayer, Site, Sublayer

TYPES: dict[str, type[Sublayer]] = {
    cls.kind: cls for cls in (AttentionSublayer, CrossAttentionSublayer, FeedForwardSublayer)
}


SUBLAYERS = tuple(TYPES)


UNKNOWN = "the layout of its blocks is not known; methods for norms work, and target= with endings of module paths"


def check_sublayers(method: str, names: Sequence[str], sites: Sequence[Site]) -> None:
    """Raise PlanError unless the model has each of these sublayers."""
    known = list(dict.fromkeys(site.kind for site in sites if isinstance(site, Sublayer)))
    missing = next((name for name in names if name not in known), None)
    if missing:
        has = ", ".join(known) or f"none: {UNKNOWN}"
        raise PlanError(f"{method}: site names {missing!r}, which is not found in this model; it has {has}")


def find_sublayers(model: nn.Module) -> list[Sublayer]:
    """Each attention, cross-attention and feed-forward sublayer of the blocks, in order.

    `path` is the map that the sublayer is left by, `entry` the one that it is entered by. A mixture of experts is one
    module with its router: both paths are that.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    stacks = find_blocks(model)
    found: list[Sublayer] = []
    for stack, blocks in stacks.items():
        for layer, block in enumerate(blocks):
            spans = list(_spans(block))
            dense = any(span.kind == "feed_forward" for span in spans)
            for span in spans if dense else (*spans, *_experts(block)):
                found.append(_placed(span, f"{paths[id(block)]}.", layer=layer, depth=len(blocks), stack=stack))
    for part in loose_parts(model, stacks):
        found += [_placed(span, f"{paths[id(part)]}.") for span in _spans(part)]
    own = {(id(model.get_submodule(site.path)), site.kind): site for site in reversed(found)}
    return list(own.values())[::-1]  # Zamba's blocks share one


@dataclass(frozen=True)
class _Span:
    """A sublayer of a block: kind, first map, last map, and the widths of what enters and what leaves."""

    kind: str
    entry: str
    path: str
    widths: tuple[int, int]


def _placed(span: _Span, root: str, **place: Any) -> Sublayer:
    width_in, width_out = span.widths
    roles = frozenset({"block", span.kind})
    path, entry = root + span.path, root + span.entry
    return TYPES[span.kind](path, roles, width_in=width_in, width_out=width_out, entry=entry, **place)


def _experts(block: nn.Module) -> Iterator[_Span]:
    """The mixtures of experts of a block: a router and, beside it, experts in a list or stacked in 3-D parameters.

    Not an attention, which may have experts (JetMoe) or a weight for each head (Funnel) of its own.
    """
    found: list[str] = []
    for path, module in reversed(list(block.named_modules())):  # from the inside out
        if not path or any(within(inner, path) for inner in found) or _in_attention(block, path):
            continue
        if width := _routed(module):
            found.append(path)
            yield _Span("feed_forward", path, path, (width, width))


def _routed(module: nn.Module) -> int:
    """The width of a router's input, in a module that holds a router and experts; 0 for any other."""
    stacked = [child for child in module.modules() if _is_stacked(child)]
    experts = [child for name, child in module.named_children() if name == "experts"]
    count = next((p.shape[0] for child in stacked for p in child.parameters(recurse=False) if p.ndim == 3), 0)
    inside = {id(p) for child in (*stacked, *experts) for p in child.parameters()}
    if not inside:
        return 0
    owned = ((n, p, m) for m in module.modules() for n, p in m.named_parameters(recurse=False))
    routers = (own_shapes(owner)[name] for name, p, owner in owned if id(p) not in inside)
    return next((s[1] for s in routers if len(s) == 2 and (not count or s[0] == count)), 0)


def _is_stacked(module: nn.Module) -> bool:
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    return not convolution and any(p.ndim == 3 for p in module.parameters(recurse=False))


def _in_attention(block: nn.Module, path: str) -> bool:
    parts = path.split(".")
    classes = (type(block.get_submodule(".".join(parts[: i + 1]))).__name__.lower() for i in range(len(parts)))
    return any("attention" in name for name in classes)


def _spans(block: nn.Module) -> Iterator[_Span]:
    """Each sublayer of a block that a row of the table describes."""
    seen: set[str] = set()
    for layout, linears in matching(block):
        fused = tuple(part.path for part in layout.fused)
        first = (*layout.latent, *layout.query, *layout.ff_in, *fused)
        last = (*layout.attention_out, *layout.ff_out)
        if first and last and last[0] not in seen:
            seen.add(last[0])
            ends = widths(linears[first[0]])[0], widths(linears[last[0]])[1]
            yield _Span(_kind(layout), first[0], last[0], ends)


def _kind(layout: Layout) -> str:
    if layout.ff_out:
        return "feed_forward"
    return "cross_attention" if "cross" in layout.name else "attention"
