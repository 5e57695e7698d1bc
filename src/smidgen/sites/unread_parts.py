"""Parts of a model that its class or its configuration never reads, so that nothing in them can be trained.

A pooler whose output the class drops, and what lies above the states of a tower that `config.vision_feature_layer`
names: LLaVA takes those before the last block. Told from the code of the classes (`flow.py`); what is not plain there
counts as read.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from smidgen.sites.data_flow import UnclearError, check_plain, definitions, output_fields, own, reachable
from smidgen.sites.discovery import find_blocks
from smidgen.sites.roles import within
from smidgen.sites.site import Site

WHOLE = "*"  # read in a way that is not followed
RECORDS = ("hidden_states", "attentions")  # ends of the names of what is handed on beside the result


@dataclass(frozen=True)
class _Part:
    """A module's own attribute, past what it gives."""

    name: str


@dataclass(frozen=True)
class _Place:
    """Of what is given, the field at a place, or all from there on (`alone` is False)."""

    start: int
    alone: bool


@dataclass(frozen=True)
class _Chosen:
    """The hidden states that a field of the configuration names."""

    field: str


@dataclass(frozen=True)
class _Returned:
    """All that is given, but for fields that are stored to before."""

    but: frozenset[str] = frozenset()


_Read = str | _Part | _Place | _Chosen | _Returned  # of what a child gives; a string is the name of a field, or WHOLE


def unread(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that are never read, outermost ones."""
    found: list[str] = []
    parents = _parents(model)
    for path, owner in model.named_modules():
        if isinstance(owner, PreTrainedModel):
            for name, reads in _reads(_class(owner)).items():
                child = owner._modules.get(name)
                if child is not None and parents[id(child)] == 1:
                    inner = f"{path}.{name}" if path else name
                    found += (f"{inner}.{part}" for part in _idle(owner, child, reads))
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    held = [path for path in dict.fromkeys(found) if _is_owner(model.get_submodule(path), path, owners)]
    return tuple(path for path in held if not any(path != other and within(path, other) for other in held))


def _is_owner(module: nn.Module, path: str, owners: Mapping[int, Sequence[str]]) -> bool:
    """Whether a module has parameters, all of them for itself (BART's `shared` are those of other modules)."""
    names = [name for parameter in module.parameters() for name in owners[id(parameter)]]
    return bool(names) and all(within(name, path) for name in names)


AnySite = TypeVar("AnySite", bound=Site)


def read_sites(model: nn.Module, sites: list[AnySite]) -> list[AnySite]:
    """Without those in parts that are never read; "top:2" counts the blocks that are."""
    closed = unread(model)
    if not closed:
        return sites
    names = {id(module): path for path, module in model.named_modules()}
    depths = {
        stack: sum(not any(within(names[id(block)], path) for path in closed) for block in blocks)
        for stack, blocks in find_blocks(model).items()
    }
    kept = (site for site in sites if not any(within(site.path, path) for path in closed))
    return [replace(site, depth=depths[site.stack]) if site.depth else site for site in kept]


def _class(module: nn.Module) -> type:
    return type(module)


def _parents(model: nn.Module) -> dict[int, int]:
    """Identity of each module -> how many modules have it as a child; more where code goes past its owner."""
    count: dict[int, int] = {}
    for owner in model.modules():
        for child in owner.children():
            count[id(child)] = count.get(id(child), 0) + 1
        for chain in _chains(_class(owner)):
            module: object = owner._modules.get(chain[0])
            for name in chain[1:]:
                module = getattr(module, "_modules", {}).get(name)
                if module is not None:
                    count[id(module)] = count.get(id(module), 0) + 1
    return count


@cache
def _chains(cls: type) -> tuple[tuple[str, ...], ...]:
    """Names one behind the other, two or more, as in `self.text_model.encoder`, in what a class's forward runs."""
    found = []
    try:
        for tree in reachable(cls):
            for node in ast.walk(tree):
                names: list[str] = []
                while isinstance(node, ast.Attribute):
                    names.insert(0, node.attr)
                    node = node.value
                if len(names) > 1 and isinstance(node, ast.Name) and node.id == "self":
                    found.append(tuple(names))
    except UnclearError:
        return ()
    return tuple(found)


@cache
def _reads(cls: type) -> dict[str, frozenset[_Read]]:
    """Child that a class calls -> what it reads of the output."""
    found: dict[str, set[_Read]] = {}
    try:
        check_plain(cls)
        for tree in reachable(cls):
            for name, read in _read_in(tree):
                found.setdefault(name, set()).add(read)
    except UnclearError:
        return {}
    return {name: frozenset(reads) for name, reads in found.items()}


def _read_in(tree: ast.AST) -> Iterator[tuple[str, _Read]]:
    """Child, what is read of it, in a function."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (name := own(node)):
            continue
        parent = parents.get(node)
        if isinstance(parent, ast.Call) and parent.func is node:
            variable = _assigned(parents.get(parent), parent)
            uses = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == variable]
            reads = (
                [_use(n, parents) for n in uses if isinstance(n.ctx, ast.Load)] if variable else [_use(parent, parents)]
            )
            yield from ((name, read) for read in reads if read is not None and not isinstance(read, _Returned))
            if _Returned() in reads:
                owners = (parents[n] for n in uses)
                yield name, _Returned(frozenset(o.attr for o in owners if isinstance(o, ast.Attribute) and _stores(o)))
        elif isinstance(parent, ast.Attribute):
            yield name, _Part(parent.attr)
        elif not isinstance(parent, ast.Compare):
            yield name, WHOLE


def _stores(node: ast.AST) -> bool:
    return isinstance(getattr(node, "ctx", None), ast.Store)


def _assigned(parent: ast.AST | None, call: ast.AST) -> str:
    """The one name that a call's result gets."""
    targets = parent.targets if isinstance(parent, ast.Assign) else [getattr(parent, "target", None)]
    alone = isinstance(parent, ast.Assign | ast.AnnAssign) and parent.value is call and len(targets) == 1
    return targets[0].id if alone and isinstance(targets[0], ast.Name) else ""


def _use(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> _Read | None:
    """What is read of an output; None for nothing that counts."""
    parent = parents.get(node)
    if isinstance(parent, ast.Attribute):
        return _field(parent, parents)
    if isinstance(parent, ast.Subscript) and parent.value is node:
        place, alone = parent.slice, True
        if isinstance(place, ast.Slice) and place.upper is None and place.step is None:
            place, alone = place.lower or ast.Constant(0), False
        start = _count(place)
        return WHOLE if start is None else _Place(start, alone)
    return _Returned() if isinstance(parent, ast.Return) else WHOLE


def _count(node: ast.AST) -> int | None:
    """The whole number, not below 0, that is written there."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int) and node.value >= 0:
        return node.value
    return None


def _field(node: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> _Read | None:
    parent = parents.get(node)
    if _stores(node):
        return None
    if node.attr.endswith(RECORDS) and isinstance(parent, ast.keyword) and parent.arg == node.attr:
        return None
    if node.attr == "hidden_states" and isinstance(parent, ast.Subscript) and isinstance(parent.slice, ast.Name):
        return _Chosen(_source(parent.slice.id, parent, parents))
    return WHOLE if isinstance(parent, ast.Call) and parent.func is node else node.attr


def _source(name: str, node: ast.AST, parents: dict[ast.AST, ast.AST]) -> str:
    """What a name runs over in a comprehension around a node; else the name."""
    around: ast.AST | None = node
    while around is not None:
        for loop in getattr(around, "generators", ()):
            if isinstance(loop.target, ast.Name) and loop.target.id == name and isinstance(loop.iter, ast.Name):
                return loop.iter.id
        around = parents.get(around)
    return name


def _idle(owner: nn.Module, child: nn.Module, reads: Collection[_Read]) -> Iterator[str]:
    """Paths in a child of what none of the reads depends on."""
    reads = {read for read in reads if not isinstance(read, _Part) or _is_part(child, read.name)}
    layers = [read.field for read in reads if isinstance(read, _Chosen)]
    if layers:
        others = {read for read in reads if not isinstance(read, _Returned | _Chosen)}
        if not others - {"last_hidden_state"} and len(layers) == 1:
            yield from _above(child, getattr(owner.config, layers[0], None), bool(others))
        return
    known = output_fields(_class(child))
    if known is None or WHOLE in reads or any(isinstance(read, _Part) for read in reads):
        return
    used = _used(known, reads)
    if used is not None:
        yield from (name for name, module in child.named_children() if name not in used)


def _is_part(module: nn.Module, name: str) -> bool:
    """Whether what stands under a name of a module computes: a child, a function."""
    return name in module._modules or callable(getattr(type(module), name, None))


def _used(known: dict[str, frozenset[str]], reads: Collection[_Read]) -> set[str] | None:
    """The children behind what is read; None where that is not told."""
    used: set[str] = set()
    for read in reads:
        if isinstance(read, str):
            if read not in known:
                return None
            used |= known[read]
        elif isinstance(read, _Returned):
            used = used.union(*(children for name, children in known.items() if name not in read.but))
        elif isinstance(read, _Place):
            names = list(known)[read.start :]
            # a field that is None is no place: what is behind the first may be any of the next
            names = names[:1] if read.alone and not read.start else [n for n in names if not n.endswith(RECORDS)]
            used = used.union(*(known[name] for name in names))
    return used


def _above(tower: nn.Module, chosen: object, last: bool) -> Iterator[str]:
    """Paths in a tower of what lies above the states that a configuration chooses, 0 those that enter the first block.

    `last`: whether the class reads the tower's last output where the last state is chosen.
    """
    wanted = [chosen] if isinstance(chosen, int) else chosen
    stacks = find_blocks(tower)
    if not isinstance(wanted, list | tuple) or len(stacks) != 1:
        return
    ((path, blocks),) = stacks.items()
    states = len(blocks) + 1
    if len(blocks) != getattr(getattr(tower, "config", None), "num_hidden_layers", 0):
        return
    top = max((index % states for index in wanted if -states <= index < states), default=states - 1)
    names = {id(module): name for name, module in tower.named_modules()}
    yield from (names[id(block)] for block in blocks[top:])
    around = [".".join(path.split(".")[:depth]) for depth in range(path.count(".") + 1)]
    recorded = [level for level in around if _ties(tower.get_submodule(level)) is not None]
    inner = not recorded
    for level in around:
        # what is recorded in a module leaves the modules around it as it is
        inner = inner or level == recorded[0]
        module = tower.get_submodule(level)
        behind = set(_behind(module, path.removeprefix(level + ".").partition(".")[0]))
        if top == states - 1 and inner and (last or _ties(module) is not False):
            known = output_fields(_class(module))
            behind -= behind if known is None else known.get("last_hidden_state", behind)
        yield from (f"{level}.{name}" if level else name for name in sorted(behind))


def _behind(module: nn.Module, name: str) -> Iterator[str]:
    """Names of the children that a module calls after one of them."""
    lines = _lines(_class(module))
    first = min(lines.get(name, ()), default=None)
    if first is not None:
        yield from (other for other in module._modules if min(lines.get(other, ()), default=0) > first)


@cache
def _lines(cls: type) -> dict[str, list[int]]:
    """Attribute of self -> where a class's forward mentions it, by line."""
    found: dict[str, list[int]] = {}
    try:
        check_plain(cls)
        for node in ast.walk(definitions(cls, "forward")[0]):
            if name := own(node):
                found.setdefault(name, []).append(node.lineno)  # type: ignore[attr-defined]
    except (UnclearError, IndexError):
        return {}
    return found


def _ties(module: nn.Module) -> bool | None:
    """Whether a module that records states puts its last output in place of the last; None if it records none."""
    forward: object = type(module).forward
    while forward is not None:
        names, cells = getattr(forward, "__code__", None), getattr(forward, "__closure__", None) or ()
        held = dict(zip(getattr(names, "co_freevars", ()), cells, strict=False))
        if "tie_last_hidden_states" in held:
            told = getattr(getattr(module, "config", None), "tie_last_hidden_states", None)
            return bool(held["tie_last_hidden_states"].cell_contents if told is None else told)
        forward = getattr(forward, "__wrapped__", None)
    return None
