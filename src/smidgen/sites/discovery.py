"""Model -> sites: every module that owns parameters, what it is and what part it plays.

Blocks, norms and embeddings are found by structure; the linear maps inside a block by `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from smidgen.common.wrappers import bare, is_plain
from smidgen.sites.architectures import NORM_ROLES
from smidgen.sites.fused_rows import Rows
from smidgen.sites.module_calls import never_called
from smidgen.sites.module_kinds import CONVOLUTIONS, channel_axis, is_norm, is_table, kind_of, norm_form, widths
from smidgen.sites.quantised.maps import own_shapes
from smidgen.sites.roles import linear_parts, matching, norm_roles, within
from smidgen.sites.site import (
    ROLES,
    ConvSite,
    EmbeddingSite,
    LinearSite,
    MapSite,
    NormSite,
    OtherSite,
    OwnerSite,
    Site,
    TableSite,
    UncalledSite,
    WeightSite,
)


@dataclass(frozen=True)
class _Part:
    """What a module's place in the model says of it."""

    roles: frozenset[str] = frozenset()
    layer: int | None = None
    depth: int = 0
    stack: str = ""
    slices: tuple[tuple[str, Rows], ...] = ()


def find_sites(model: nn.Module) -> list[OwnerSite]:
    """Every module that owns parameters, once each, in order of registration, as a site of its kind.

    Slices of a fused projection (query, key, value) follow the whole, with the rows of its weight that are theirs.
    """
    model = bare(model)
    stacks = find_blocks(model)
    parts = _parts_outside(model, stacks) | _parts_of_blocks(stacks) | _parts_of_lists(model, stacks)
    idle = never_called(model)
    sites: list[OwnerSite] = []
    for path, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        part = parts.get(id(module), _Part())
        whole = _owner(path, module, part, _corrected(part.roles, model, path))
        if id(module) in idle and isinstance(whole, LinearSite | ConvSite):
            whole = UncalledSite.beside(whole, terms=whole.terms, bias=whole.bias, transposed=whole.transposed)
        sites.append(whole)
        for role, rows in part.slices:
            assert isinstance(whole, MapSite)
            sites.append(replace(whole, roles=frozenset({role}), rows=rows, width_out=rows.length))
    return sites


def find_tables(model: nn.Module, sites: Iterable[Site]) -> list[TableSite]:
    """Each embedding as a linear map of one-hot vectors: `width_in` rows, whose numbers come in, `width_out` wide."""
    owners = (site for site in sites if isinstance(site, EmbeddingSite))
    tables = (site for site in owners if is_table(model.get_submodule(site.path)))
    return [
        TableSite.beside(site, roles=frozenset[str](), width_in=site.width_in, width_out=site.width_out)
        for site in tables
    ]


def find_weights(model: nn.Module, sites: Iterable[Site]) -> list[WeightSite]:
    """Each weight of two axes, or several stacked, that a module other than a plain called map reads: of experts, of
    nn.MultiheadAttention, of maps that are only read."""
    owners = (site for site in sites if isinstance(site, OtherSite | UncalledSite))
    return [found for site in owners for found in _weights(model.get_submodule(site.path), site)]


def _weights(module: nn.Module, site: OwnerSite) -> Iterator[WeightSite]:
    for term, shape in site.terms:
        several = len(shape) == 3 and shape[0] > 1 and not hasattr(module, "kernel_size")
        maps = isinstance(module, nn.Linear | Conv1D) and term == "weight"
        attention = isinstance(module, nn.MultiheadAttention) and term.endswith("proj_weight")
        if min(shape, default=0) > 0 and (several or (len(shape) == 2 and (maps or attention))):
            count = shape[0] if several else 1
            known = {"term": term, "width_in": shape[-1], "width_out": shape[-2], "count": count}
            yield WeightSite.beside(site, roles=frozenset[str](), **known)


def find_blocks(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Path of each stack -> its blocks, in order."""
    return {path: list(_blocks_in(stack)) for path, stack in _stacks_in(model).items()}


def roles_found(sites: Iterable[Site]) -> list[str]:
    """The roles that occur among these sites, in the order of `ROLES`."""
    present = {role for site in sites for role in site.roles}
    return [role for role in ROLES if role in present]


def shares_layers(model: nn.Module) -> bool:
    """Whether one block is applied more than once (ALBERT), so that it belongs to no single layer."""
    for module in model.modules():
        config, listed = getattr(module, "config", None), list(module._modules.values())
        groups, layers = (getattr(config, n, None) for n in ("num_hidden_groups", "num_hidden_layers"))
        if isinstance(groups, int) and isinstance(layers, int) and groups < layers:
            return True
        if len(set(map(id, listed))) < len(listed) and _is_stack(module):
            return True
    return False


def _corrected(roles: frozenset[str], model: nn.Module, path: str) -> frozenset[str]:
    """The roles of a module by its place, or what `NORM_ROLES` has for it."""
    owner, _, name = path.rpartition(".")
    classes = type(model.get_submodule(owner)).__mro__
    known = [NORM_ROLES[cls.__name__, name] for cls in classes if (cls.__name__, name) in NORM_ROLES]
    return (roles & {"block"}) | {known[0]} if known else roles


def _owner(path: str, module: nn.Module, part: _Part, roles: frozenset[str]) -> OwnerSite:
    """The site of a whole module that owns parameters, of the type that its kind asks for."""
    terms = own_shapes(module)
    kind = kind_of(module)
    bias = next((name for name in ("bias", "in_proj_bias", "beta") if name in terms), None)
    width_in, width_out = widths(module)
    known: dict[str, Any] = {
        "path": path,
        "roles": roles | ({kind} & {"norm", "embedding"}),
        "terms": tuple(terms.items()),
        "layer": part.layer,
        "depth": part.depth,
        "stack": part.stack,
        "width_in": width_in,
        "width_out": width_out,
        "bias": bias,
        "axis": channel_axis(module),
    }
    if kind == "linear":
        return LinearSite(**known, transposed=isinstance(module, Conv1D))
    if kind == "norm":
        form, gain = norm_form(module), next((name for name in terms if name != bias), None)
        affine = form is not None and len(next(iter(terms.values()))) == 1
        return NormSite(**known, gain=gain, affine=affine, offset=form.offset if form else 0.0)
    if isinstance(module, CONVOLUTIONS) and kind == "conv":
        how = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
        return ConvSite(**known, **how)
    return (EmbeddingSite if kind == "embedding" else OtherSite)(**known)


def _count(module: nn.Module, kind: str) -> int:
    return sum(kind_of(m) == kind for m in module.modules())


def is_block(module: nn.Module) -> bool:
    """Whether a module has a norm and two linear maps, as transformer, Mamba and ConvNeXt blocks do."""
    return any(map(is_norm, module.modules())) and _count(module, "linear") >= 2


def _alike(modules: nn.Module) -> bool:
    return len(set(map(type, modules.children()))) == 1


def _is_stack(module: nn.Module) -> bool:
    """Whether a module is a list of blocks; a Sequential of several classes is a chain, no list."""
    listed = isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and _alike(module))
    return listed and any(True for _ in module.children()) and all(map(is_block, module.children()))


def _stacks_in(module: nn.Module) -> dict[str, nn.Module]:
    """Path -> each outermost list of blocks in a module."""
    found: dict[str, nn.Module] = {}
    for path, part in module.named_modules():
        if _is_stack(part) and not any(within(path, outer) for outer in found):
            found[path] = part
    return found


def _blocks_in(stack: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a stack: its elements, or theirs where an element is a stage (Swin, ConvNeXt, ALBERT).

    A stage holds most of its linear maps in lists of blocks of one class: not so T5's sublayers (several
    classes), experts (no norms) and the feed-forward list of a MobileBERT block (the smaller half).
    """
    for element in stack.children():
        inner = list(filter(_alike, _stacks_in(element).values()))
        is_stage = 2 * sum(_count(found, "linear") for found in inner) > _count(element, "linear")
        yield from (block for found in inner for block in _blocks_in(found)) if is_stage else (element,)


def _parts_of_blocks(stacks: dict[str, list[nn.Module]]) -> dict[int, _Part]:
    """Identity of each module in a block -> its part there."""
    parts: dict[int, _Part] = {}
    for stack, blocks in stacks.items():
        norms: dict[type, dict[str, frozenset[str]]] = {}
        # the block with most norms speaks for its class: ModernBERT's first has none before its attention
        for block in sorted(blocks, key=lambda b: _count(b, "norm"), reverse=True):
            linears, slices = linear_parts(block)
            known = norms.setdefault(type(block), norm_roles(block, linears)) | linears
            for path, module in block.named_modules():
                roles = known.get(path, frozenset[str]()) | {"block"}
                part = _Part(roles, blocks.index(block), len(blocks), stack, tuple(slices.get(path, ())))
                parts.setdefault(id(module), part)
    return parts


def loose_parts(model: nn.Module, stacks: Iterable[str]) -> Iterator[nn.Module]:
    """Sublayers that stand in lists side by side, all attentions in one, in a model that has no blocks (XLM)."""
    if not any(True for _ in stacks):
        lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
        yield from (child for found in lists for child in found.children() if any(True for _ in matching(child)))


def _parts_of_lists(model: nn.Module, stacks: Iterable[str]) -> dict[int, _Part]:
    """Identity of each linear map of the model's `loose_parts` -> its part there; they count no layers."""
    parts: dict[int, _Part] = {}
    for part in loose_parts(model, stacks):
        linears, slices = linear_parts(part)
        for path, roles in linears.items():
            parts[id(part.get_submodule(path))] = _Part(roles | {"block"}, slices=tuple(slices.get(path, ())))
    return parts


def _parts_outside(model: nn.Module, stacks: Iterable[str]) -> dict[int, _Part]:
    """Identity of each norm outside the stacks -> "embedding" or "final", by its side of the nearest stacks.

    A final norm belongs to a module that holds the stack, in the base model; the others behind are a head's.
    """
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    base = getattr(model, "base_model_prefix", "")
    if base not in order or is_plain(model):
        base = ""
    parts: dict[int, _Part] = {}
    for path, module in model.named_modules():
        owner = path.rpartition(".")[0]
        near = _nearest(owner, stacks)
        if kind_of(module) != "norm" or not near or any(within(path, stack) for stack in stacks):
            continue
        if all(order[path] < order[stack] for stack in near):
            parts[id(module)] = _Part(frozenset({"embedding"}))
        elif all(order[path] > order[stack] and within(stack, owner) for stack in near) and within(path, base):
            parts[id(module)] = _Part(frozenset({"final"}))
    return parts


def _nearest(path: str, stacks: Iterable[str]) -> list[str]:
    """The stacks in the module at this path, or in the nearest one around it that has any."""
    near = [stack for stack in stacks if within(stack, path)]
    return near if near or not path else _nearest(path.rpartition(".")[0], stacks)
