"""Roles of a block's parts: its linear maps by the table of layouts, its norms by order of registration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from torch import nn
from transformers.pytorch_utils import Conv1D

from smidgen.sites.architectures import HEAD_DIMS, LAYOUTS, VALUE_DIMS, Fused, Layout
from smidgen.sites.fused_rows import Rows
from smidgen.sites.module_calls import never_called
from smidgen.sites.module_kinds import kind_of, widths

Roles = dict[str, frozenset[str]]


Slices = list[tuple[str, Rows]]


def linear_parts(block: nn.Module) -> tuple[Roles, dict[str, Slices]]:
    """Path of each known linear map of a block -> its roles; of fused ones -> role and rows of each part."""
    roles: Roles = {}
    slices: dict[str, Slices] = {}
    for layout, linears in matching(block):
        roles = layout.roles() | roles
        slices |= {f.path: _slices(block, f, layout, linears) for f in layout.fused}
    return roles, slices


def matching(block: nn.Module) -> Iterator[tuple[Layout, dict[str, nn.Module]]]:
    """The rows of `LAYOUTS` that a block has, each with all linear maps of the block by path.

    A map that is read and never called counts for nothing: no edit of its input or output would act.
    """
    idle = never_called(block)
    found = ((path, module) for path, module in block.named_modules() if id(module) not in idle)
    linears = {path: module for path, module in found if kind_of(module) == "linear"}
    for layout in LAYOUTS:
        stored = all(isinstance(linears.get(f.path), Conv1D) is f.transposed for f in layout.fused)
        if stored and linears.keys() >= layout.roles().keys():
            yield layout, linears


def _slices(block: nn.Module, fused: Fused, layout: Layout, linears: dict[str, nn.Module]) -> Slices:
    """The parts of a fused map; none if its rows do not divide as the table says."""
    total = widths(linears[fused.path])[1]
    out = widths(linears[layout.attention_out[0]])[0] if layout.attention_out else 0
    counts = _counts(fused, total, out)
    size = head_dim(block.get_submodule(fused.path.rpartition(".")[0]), VALUE_DIMS)
    groups = fused.groups or (counts[-1] // size if size else 0)
    if not groups or sum(counts) != total or any(count % groups for count in counts):
        return []
    ends = list(accumulate(count // groups for count in counts))
    return [(part, Rows(a, b, groups)) for part, a, b in zip(fused.parts, [0, *ends], ends, strict=False)]


def _counts(fused: Fused, total: int, out: int) -> list[int]:
    """Rows of each part: a query's heads, or those of a value by the head, are the inputs of the output map.

    The other parts are of equal size.
    """
    known = "query" if "query" in fused.parts else "value" if fused.groups is None else None
    rest = (total - out) // (len(fused.parts) - 1) if known else total // len(fused.parts)
    return [out if part == known else rest for part in fused.parts]


def head_dim(attention: nn.Module, names: Sequence[str] = HEAD_DIMS) -> int:
    """Width of a key's head (or of a value's), as an attention module says it; 0 if it does not."""
    found = (getattr(attention, name, 0) for name in names)
    return next((size for size in found if isinstance(size, int) and size), 0)


def norm_roles(block: nn.Module, linear_roles: Roles) -> Roles:
    """Path of each norm of a block -> "qk", "attention", "output", the last two (it feeds both) or none.

    A norm inside an attention sublayer is that sublayer's own, and the others are then the feed-forward's,
    unless the block itself owns some for every sublayer. Otherwise the norms, in order of registration, are
    dealt out evenly: first to the attention sublayers, last to the feed-forward.
    """
    roots = _attention_roots(block, linear_roles)
    norms = {path: _is_qk(block, path, roots) for path, m in block.named_modules() if kind_of(m) == "norm"}
    inside = [n for n, qk in norms.items() if not qk and any(within(n, root) for root in roots)]
    outside = [n for n, qk in norms.items() if not qk and n not in inside]
    dealt = [n for n in outside if "." not in n] if inside else outside
    found = {n: {"qk"} if qk else {"attention"} if n in inside else set[str]() for n, qk in norms.items()}
    each, left = divmod(len(dealt), len(roots) + 1)
    if inside:
        found |= {n: {"output"} for n in outside}
    if roots and not left:
        found |= {n: {"attention" if i < each * len(roots) else "output"} for i, n in enumerate(dealt)}
    elif len(outside) == 1 and not inside and (roots or linear_roles):
        found[outside[0]] = {"attention", "output"} if roots else {"output"}
    return {n: frozenset(roles) for n, roles in found.items()}


def _attention_roots(block: nn.Module, linear_roles: Roles) -> list[str]:
    """Paths of the sublayers that hold known projections or whose class says so; T5 keeps them in a list."""
    parts = dict(block.named_children())
    lists = [name for name, part in parts.items() if isinstance(part, nn.ModuleList)]
    for name in lists:
        parts |= {f"{name}.{i}": part for i, part in parts.pop(name).named_children()}
    known = [path for path, roles in linear_roles.items() if "attention" in roles]
    by_class = {path for path, part in parts.items() if "attention" in type(part).__name__.lower()}
    return [path for path in parts if path in by_class or any(within(p, path) for p in known)]


def _is_qk(block: nn.Module, path: str, roots: list[str]) -> bool:
    """Whether a norm is one of a pair that an attention owns side by side with its projections."""
    owner = path.rpartition(".")[0]
    kinds = [kind_of(child) for child in block.get_submodule(owner).children()]
    in_attention = any(within(owner, root) for root in roots)
    return in_attention and kinds.count("norm") == 2 and kinds.count("linear") >= 2


def within(path: str, outer: str) -> bool:
    """Whether a module path is that of `outer` or of something in it; "" holds everything."""
    return not outer or path == outer or path.startswith(outer + ".")
