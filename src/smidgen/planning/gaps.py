"""What a recipe's words would cover on a model and its plan does not: where, and why.

Methods are asked, not known: what one does at a map that is a query, at a norm, at an attention, tells what its words
mean; what it does not reach of these is looked for among the sites, block by block.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from smidgen.common.errors import PlanError
from smidgen.methods.base import Method
from smidgen.planning.advice import Advice, without_numbers
from smidgen.planning.compatibility import is_stacked
from smidgen.planning.entry import Entry
from smidgen.planning.rules.attention import keys_at
from smidgen.planning.site_rules import rules_for, rules_of
from smidgen.sites.discovery import find_blocks
from smidgen.sites.module_calls import never_called
from smidgen.sites.module_kinds import is_linear
from smidgen.sites.roles import within
from smidgen.sites.site import (
    AttentionSublayer,
    ConvSite,
    CrossAttentionSublayer,
    EmbeddingSite,
    FeedForwardSublayer,
    LinearSite,
    NormSite,
    OtherSite,
    OwnerSite,
    Site,
    Sublayer,
    UncalledSite,
)
from smidgen.sites.unread_parts import unread

LAYOUT = "its layout is not known, so nothing says which map is which"
STACKED = "weights of several experts stacked in one parameter, whose inputs and outputs no hook sees"
BY_HEAD = "weights with an axis of heads, no maps of two axes"
UNCALLED = "maps that are read and never called, whose inputs and outputs no hook sees"
OWN = "a forward of its own: no plain map of a weight"
FUSED = "which rows of the fused map are which is not known"
RUNNING = "statistics that run, as BatchNorm's"
SHAPE = "its gain is not one by channel or by head"
PLACE = "which sublayer the norm belongs to is not known"
NAMED = "named by its path, and no linear map"
CONVOLVED = "a feed-forward part of convolutions, where linear maps are looked for"
OUTSIDE = "it lies outside of all stacks of blocks, where no parts are looked for"
NO_GRADIENT = "no gradient passes: under torch.no_grad"
ABSENT = "a stack without the parts that it names"


@dataclass(frozen=True)
class Gap:
    """What one method leaves out for one reason.

    Attributes:
        places: module paths, * for the numbers of layers.
        count: how many modules these are.
        advice: what would reach them; "" if nothing is known to.
    """

    method: str
    reason: str
    places: tuple[str, ...]
    count: int
    advice: str = ""

    def __str__(self) -> str:
        more = f" and {len(self.places) - 3} more" if len(self.places) > 3 else ""
        advice = f"; {self.advice}" if self.advice else ""
        return f"{', '.join(self.places[:3])}{more}: {self.reason}{advice}"


def left_out(
    method: Method, model: nn.Module, sites: Sequence[Site], shut: Sequence[Site], entries: Sequence[Entry]
) -> tuple[Gap, ...]:
    """What a method that stands at `entries` leaves out.

    Args:
        sites: those that it may reach: of its `stack`, not of the head.
        shut: those through which no gradient passes.
    """
    if not entries:
        return ()
    covered = _Covered(entries)
    found = [_Candidate(s.path, s, (), NAMED) for s in sites if _named(method, s) and s.path not in covered]
    found += [c for c in _candidates(model, sites) if _wants(method, c) and c.path not in covered]
    missed = (m for rules in rules_for(method) for m in rules.missed(method, model, sites))
    found += [_Candidate(m.path, m.place, (), m.reason) for m in missed if m.path not in covered]
    found += [c for c in _norms(method, model, sites) if c.path not in covered]
    found += [_Candidate(s.path, s, (), NO_GRADIENT) for s in shut if _reaches(method, s)]
    found += _whole_stacks(method, sites, [c.path for c in found], entries)
    never = unread(model)  # named apart
    why = {c.path: c for c in found if not any(within(c.path, path) for path in never)}
    alike, advice = dict[tuple[str, str], list[str]](), Advice(method, sites)
    for path, one in why.items():
        if not any(outer in why for outer in _around(path) if outer != path):
            text = advice.for_module(path) if one.sides and one.reason != BY_HEAD else ""
            alike.setdefault((one.reason, text), []).append(path)
    return tuple(
        Gap(str(method), reason, tuple(dict.fromkeys(map(without_numbers, paths))), len(paths), text)
        for (reason, text), paths in alike.items()
    )


def meant(method: Method, model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """Paths of the modules that a method's words mean and that are no sites of it, wherever they lie."""
    return [c.path for c in _candidates(model, sites) if _wants(method, c)]


class _Covered:
    """The modules in which a method stands, or that lie in a sublayer at whose end it stands."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        entries = list(entries)
        self.around = {path for entry in entries for path in _around(entry.site.path)}
        self.whole = {entry.site.path for entry in entries if rules_of(entry.site).holds}

    def __contains__(self, path: str) -> bool:
        return path in self.around or any(outer in self.whole for outer in _around(path))


def _around(path: str) -> Iterator[str]:
    """A path and those of all modules around it but the model."""
    while path:
        yield path
        path = path.rpartition(".")[0]


@dataclass(frozen=True)
class _Candidate:
    """A module that may be left out; `sides` are the words of `WORDS` that would mean it, `place` a site in it."""

    path: str
    place: Site
    sides: tuple[str, ...]
    reason: str


def _map(*roles: str) -> LinearSite:
    terms = (("weight", (2, 2)), ("bias", (2,)))
    return LinearSite("", frozenset({*roles, "block"}), terms, width_in=2, width_out=2, bias="bias")


def _span(cls: type[Sublayer]) -> Sublayer:
    return cls("", frozenset({cls.kind, "block"}), width_in=2, width_out=2)


WORDS: dict[str, tuple[Site, ...]] = {
    "attention": (
        *(_map(role, "attention") for role in ("query", "key", "value", "attention_out")),
        *(_span(cls) for cls in (AttentionSublayer, CrossAttentionSublayer)),
        keys_at(_map("attention")),
    ),
    "feed_forward": (*(_map(role, "ff") for role in ("ff_in", "ff_out")), _span(FeedForwardSublayer)),
    "linear": (_map(),),
}


def _means(method: Method, side: str, path: str, place: Site) -> bool:
    """Whether the method would stand at a module of this path and place if it were what `side` says, in a block."""
    for example in WORDS[side]:
        here = replace(example, path=path, layer=place.layer, depth=place.depth, stack=place.stack)
        try:
            if method.acts(here):
                return True
        except PlanError:  # the stack has no layer of that number
            return False
    return False


def _wants(method: Method, candidate: _Candidate) -> bool:
    return any(_means(method, side, candidate.path, candidate.place) for side in candidate.sides)


def _named(method: Method, site: Site) -> bool:
    """Whether the method would stand at a map of this path by the path alone, at which there is none."""
    if not isinstance(site, EmbeddingSite | ConvSite | OtherSite | UncalledSite):
        return False
    like = replace(WORDS["linear"][0], path=site.path, roles=frozenset[str](), layer=site.layer, depth=site.depth)
    return method.acts(like)


def _candidates(model: nn.Module, sites: Sequence[Site]) -> Iterator[_Candidate]:
    """Weights in blocks whose part there is not known, and maps that are none."""
    paths = {id(module): path for path, module in model.named_modules()}
    blocks: dict[tuple[str, int | None], list[Site]] = {}
    for site in sites:
        if site.layer is not None and isinstance(site, OwnerSite):
            blocks.setdefault((site.stack, site.layer), []).append(site)
    idle = never_called(model)
    stacks = find_blocks(model)
    for stack, modules in stacks.items():
        for layer, block in enumerate(modules):
            here = blocks.get((stack, layer), [])
            yield from _of_block(model, paths[id(block)], here, idle)
    yield from _outside(model, [s for s in sites if s.layer is None and not s.roles], stacks)


def _outside(model: nn.Module, sites: Iterable[Site], stacks: Collection[str]) -> Iterator[_Candidate]:
    """Attentions and feed-forward networks outside of the blocks: those that pool a tower's places, or stand between
    two towers."""
    held = {outer for stack in stacks for outer in _around(stack)}
    feeds: dict[str, list[Site]] = {}
    for site in sites:
        if not any(len(shape) > 1 for _, shape in site.terms):
            continue
        if top := _attention(model, "", site.path, held):
            yield _Candidate(top, site, ("attention",), OUTSIDE)
        elif isinstance(site, LinearSite) and (top := _feed_forward(model, "", site.path, held)):
            feeds.setdefault(top, []).append(site)
    yield from (_Candidate(top, maps[0], ("feed_forward",), OUTSIDE) for top, maps in feeds.items() if len(maps) > 1)


def _of_block(model: nn.Module, root: str, sites: Sequence[Site], idle: Collection[int]) -> Iterator[_Candidate]:
    """Maps, attentions and feed-forward parts of one stack of blocks that no role is known for, with the reason."""
    parts = [s for s in sites if isinstance(s, LinearSite | OtherSite | UncalledSite)]
    known = {outer for s in parts if s.roles & {"attention", "ff"} for outer in _around(s.path)}
    roles = {role for s in parts for role in s.roles}
    unknown, others = dict[str, Site](), list[Site]()
    for site in (s for s in parts if not s.roles & {"attention", "ff"} and not s.part):
        module, top = model.get_submodule(site.path), _attention(model, root, site.path)
        if is_stacked(model, site):
            side, reason = ("attention", BY_HEAD) if top else ("feed_forward", STACKED)
            yield _Candidate(site.path, site, ("linear", side), reason)
            continue
        if isinstance(site, OtherSite) and not _is_map(module) and _is_feed_forward(model, root, site):
            yield _Candidate(site.path, site, ("linear", "feed_forward"), OWN)
            continue
        if _is_map(module) and not isinstance(site, LinearSite):
            yield _Candidate(site.path, site, ("linear",), _why(module, idle))
        if top and top not in known and any(len(shape) > 1 for _, shape in site.terms):
            unknown[top] = site if top not in unknown or _why(module, idle) == UNCALLED else unknown[top]
        elif not top and isinstance(site, LinearSite) and min(site.width_in, site.width_out) > 1:
            others.append(site)
    for top, place in unknown.items():
        module = model.get_submodule(place.path)
        yield _Candidate(top, place, ("attention",), _why(module, idle) if _is_map(module) else LAYOUT)
    lacking = not unknown and "attention" not in roles
    mixtures = {s.path.rpartition(".")[0] for s in parts if is_stacked(model, s)}
    for owner, place in _other_parts(others, known):
        is_expert = any(outer in mixtures for outer in _around(owner) if outer != owner)
        sides = ("feed_forward", "attention") if lacking and not is_expert else ("feed_forward",)
        yield _Candidate(owner, place, sides, LAYOUT)
    for top, place in _apart(model, root, others, known):
        yield _Candidate(top, place, ("feed_forward",), LAYOUT)
    yield from _convolved(model, root, sites, known)
    if "attention" in roles and "query" not in roles:
        fused = (s for s in parts if s.roles == {"attention", "block"})
        yield from (_Candidate(s.path, s, ("attention",), FUSED) for s in fused)


def _is_map(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D | nn.MultiheadAttention)


def _why(module: nn.Module, idle: Collection[int]) -> str:
    """Why a map is not known: it is not called (nn.MultiheadAttention calls none of its own), no map, or elsewhere."""
    if id(module) in idle or isinstance(module, nn.MultiheadAttention | NonDynamicallyQuantizableLinear):
        return UNCALLED
    return LAYOUT if is_linear(module) else OWN


def _other_parts(maps: Iterable[Site], known: Collection[str]) -> Iterator[tuple[str, Site]]:
    """Modules with two maps or more (a gate has one) of which no part is known: mixers, experts, shared experts."""
    owners: dict[str, list[Site]] = {}
    for site in maps:
        owners.setdefault(site.path.rpartition(".")[0], []).append(site)
    return ((owner, found[0]) for owner, found in owners.items() if len(found) > 1 and owner not in known)


def _convolved(model: nn.Module, root: str, sites: Sequence[Site], known: Collection[str]) -> Iterator[_Candidate]:
    """Feed-forward parts of two convolutions or more and no known map."""
    tops: dict[str, list[Site]] = {}
    for site in sites:
        if isinstance(site, ConvSite) and (top := _feed_forward(model, root, site.path)) and top not in known:
            tops.setdefault(top, []).append(site)
    for top, found in tops.items():
        if len(found) > 1 and not any(isinstance(s, LinearSite) and within(s.path, top) for s in sites):
            yield _Candidate(top, found[0], ("feed_forward",), CONVOLVED)


def _is_feed_forward(model: nn.Module, root: str, site: Site) -> bool:
    """Whether a module has weights of its own and lies in, or is, what says by its class that it is feed-forward."""
    return any(len(shape) > 1 for _, shape in site.terms) and bool(_feed_forward(model, root, site.path))


def _apart(model: nn.Module, root: str, maps: Iterable[Site], known: Collection[str]) -> Iterator[tuple[str, Site]]:
    """Feed-forward networks by class of which each map has a module of its own around it (Reformer's)."""
    tops: dict[str, dict[str, Site]] = {}
    for site in maps:
        if (top := _feed_forward(model, root, site.path)) and top not in known:
            tops.setdefault(top, {}).setdefault(site.path.rpartition(".")[0], site)
    counts = {top: [s.path.rpartition(".")[0] for s in maps if within(s.path, top)] for top in tops}
    for top, owners in tops.items():
        if len(owners) > 1 and all(counts[top].count(owner) == 1 for owner in owners):
            yield top, next(iter(owners.values()))


def _attention(model: nn.Module, root: str, path: str, held: Collection[str] = ()) -> str:
    """The outermost module below `root`, around a path, that says by its class that it is an attention; "" if none."""
    return _by_class("attention|attn", model, root, path, held)


def _feed_forward(model: nn.Module, root: str, path: str, held: Collection[str] = ()) -> str:
    """The same for a feed-forward network."""
    return _by_class("mlp|ffn|feed_?forward|experts?(?![a-z])", model, root, path, held)


def _by_class(pattern: str, model: nn.Module, root: str, path: str, held: Collection[str]) -> str:
    around = [o for o in _around(path) if within(o, root) and o != root and o not in held]
    named = (o for o in reversed(around) if re.search(pattern, type(model.get_submodule(o)).__name__, re.I))
    return next(named, "")


def _norms(method: Method, model: nn.Module, sites: Sequence[Site]) -> Iterator[_Candidate]:
    """Norms that are no sites of that kind, and those of which it is not known what they belong to."""
    for site in sites:
        reason, others = _as_norms(model, site)
        if others and not _reaches(method, site) and any(_reaches(method, other) for other in others):
            yield _Candidate(site.path, site, (), reason)


def _as_norms(model: nn.Module, site: Site) -> tuple[str, list[Site]]:
    """What keeps a norm from being known as one, or as one of its sublayer, and the sites that it would be."""
    module: nn.Module = model.get_submodule(site.path)
    roles = site.roles | {"norm"}
    if isinstance(site, OtherSite | UncalledSite) and "norm" in type(module).__name__.lower():
        gain = next((term for term, _ in site.terms if term != site.bias), None)
        reason = RUNNING if hasattr(module, "running_mean") else SHAPE
        return reason, [_as_norm(site, roles, gain)]
    if isinstance(site, NormSite) and roles == {"block", "norm"}:
        return PLACE, [replace(site, roles=roles | {role}) for role in ("attention", "output")]
    return "", []


def _as_norm(site: OwnerSite, roles: frozenset[str], gain: str | None) -> NormSite:
    known = {"width_in": site.width_in, "width_out": site.width_out, "bias": site.bias, "axis": site.axis}
    return NormSite.beside(site, roles=roles, terms=site.terms, gain=gain, **known)


def _reaches(method: Method, site: Site) -> bool:
    return bool(method.trains(site)) or method.acts(site)


def _whole_stacks(
    method: Method, sites: Sequence[Site], named: Sequence[str], entries: Sequence[Entry]
) -> Iterator[_Candidate]:
    """Stacks in which nothing is reached and nothing was named yet, for methods that look for parts of blocks."""
    taken = [*named, *(entry.site.path for entry in entries)]
    for stack in dict.fromkeys(site.stack for site in sites if site.stack):
        inside = [site for site in sites if site.stack == stack]
        if any(within(path, stack) for path in taken):
            continue
        place = next((s for s in inside for side in ("attention", "feed_forward") if _means(method, side, "", s)), None)
        if place is not None:
            yield _Candidate(f"{stack}.*", place, (), ABSENT)
