"""Model -> the parts that an analysis speaks of: each parameter, or some of its rows, with component and layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from smidgen.common.errors import ModelError, nearest
from smidgen.common.wrappers import bare
from smidgen.sites.discovery import find_blocks, find_sites
from smidgen.sites.fused_rows import Rows
from smidgen.sites.roles import within
from smidgen.sites.site import ConvSite, EmbeddingSite, NormSite, OwnerSite, Site
from smidgen.sites.task_head import head_names

NORMS = {
    "embedding": "embedding LN",
    "attention": "attention LN",
    "output": "output LN",
    "final": "final LN",
    "qk": "q/k norm",
}
LINEARS = {
    "query": "query",
    "key": "key",
    "value": "value",
    "attention_out": "attention out",
    "ff_in": "ff in",
    "ff_out": "ff out",
}
# In the order in which a token meets them; a norm of both sublayers is one that feeds both (Phi, Falcon).
COMPONENTS = (
    "embedding", "embedding LN", "attention LN", "q/k norm", "query", "key", "value", "attention", "attention out",
    "shared LN", "output LN", "ff in", "ff out", "convolution", "final LN", "pooler", "output embedding", "other",
    "head",
)  # fmt: skip
TERMS = ("weight", "gain", "bias")
KEYS = ("component", "term", "stack", "layer", "name")
Key = tuple[Any, ...]


@dataclass(frozen=True)
class ComponentPart:
    """A parameter, or some output rows of a fused one.

    Attributes:
        name: of the parameter in the model.
        component: one of `COMPONENTS`.
        term: "gain" (of a norm), "bias" or "weight".
        layer: index within its stack, None outside the blocks.
        stack: path of the stack of blocks, "" outside.
        rows: which of the output rows, None for the whole parameter.
        transposed: whether output rows lie along the last axis (GPT-2).
    """

    name: str
    component: str
    term: str
    layer: int | None = None
    stack: str = ""
    rows: Rows | None = None
    transposed: bool = False

    @property
    def label(self) -> str:
        """The parameter's name, with the component in brackets for a slice."""
        return self.name if self.rows is None else f"{self.name}[{self.component}]"

    def of(self, tensor: Tensor) -> Tensor:
        """The part's values of a tensor with the parameter's shape."""
        if self.rows is None:
            return tensor
        return self.rows.take(tensor, -1 if self.transposed or tensor.ndim == 1 else 0)


def components(model: nn.Module) -> list[ComponentPart]:
    """Every value of every parameter once, in the model's order; a tied parameter under its first name.

    Components come from the roles of `find_sites`, the head from `head_names`, the pooler and the output embedding
    from where the base model keeps them. What has no known place is "other".
    """
    model = bare(model)
    head = set(head_names(model))
    first = {id(p): name for name, p in model.named_parameters()}
    owned = dict(model.named_parameters(remove_duplicate=False))
    sites: dict[str, list[OwnerSite]] = {}
    for site in find_sites(model):
        sites.setdefault(site.path, []).append(site)
    places = _Places.of(model)
    parts = []
    for path, (whole, *slices) in sites.items():
        for term, _ in whole.terms:
            name = f"{path}.{term}" if path else term
            if first[id(owned[name])] == name:
                kind = "gain" if term == getattr(whole, "gain", None) else "bias" if term == whole.bias else "weight"
                found = ["head"] if name in head else [_label(site, places) for site in slices or [whole]]
                pieces = slices if slices and name not in head else [whole]
                parts += [_part(name, label, kind, site) for label, site in zip(found, pieces, strict=True)]
    return parts


def part_of(parts: Iterable[ComponentPart], tensor: str) -> list[ComponentPart]:
    """The parts that a saved tensor of a delta belongs to; one that an edit added takes its module's component.

    Raises:
        ModelError: the model has no such tensor.
    """
    parts = list(parts)
    known = [part for part in parts if part.name == tensor]
    if known:
        return known
    if tensor.startswith("edits."):  # what sites of several layers share
        return [ComponentPart(tensor, "other", "weight")]
    path, edits, rest = tensor.partition(".edits.")
    here = [part for part in parts if part.name.rpartition(".")[0] == path]
    inside = [part for part in parts if edits and not here and within(part.name, path)]
    if inside:  # keys and values that were added to an attention
        return [ComponentPart(tensor, "attention", "weight", inside[0].layer, inside[0].stack)]
    if not edits or not here:
        names = [part.name for part in parts]
        raise ModelError(f"the model has no tensor {tensor!r}{nearest(tensor, names)}")
    role = rest.partition(".")[0].partition("-")[2].rstrip("0123456789")
    chosen = next((part for part in here if part.component == LINEARS.get(role)), here[0])
    return [ComponentPart(tensor, chosen.component, "weight", chosen.layer, chosen.stack)]


def stack_names(parts: Iterable[ComponentPart]) -> dict[str, str]:
    """Path of each stack -> the shortest words that tell it from the others; "" if there is only one."""
    stacks = list(dict.fromkeys(part.stack for part in parts if part.layer is not None))
    split = [stack.split(".") for stack in stacks]
    if len(stacks) < 2:
        return dict.fromkeys(stacks, "")
    same = set.intersection(*map(set, split))
    return {stack: ".".join(w for w in words if w not in same) for stack, words in zip(stacks, split, strict=True)}


def known_components(parts: Iterable[ComponentPart]) -> list[str]:
    """The components that occur, in the order of `COMPONENTS`."""
    present = {part.component for part in parts}
    return [name for name in COMPONENTS if name in present]


def grouped(parts: Sequence[ComponentPart], by: Sequence[str]) -> dict[Key, list[int]]:
    """Key (of the fields of a part named by `by`, of `KEYS`) -> numbers of its parts, in the order of the components.

    Raises:
        ModelError: no such field; names the nearest.
    """
    wrong = next((name for name in by if name not in KEYS), None)
    if wrong is not None:
        raise ModelError(f"a table cannot be made by {wrong!r}{nearest(wrong, KEYS)}; by {', '.join(KEYS)}")
    groups: dict[Key, list[int]] = {}
    for index in sorted(range(len(parts)), key=lambda i: COMPONENTS.index(parts[i].component)):
        groups.setdefault(tuple(getattr(parts[index], name) for name in by), []).append(index)
    return groups


def check_components(wanted: Sequence[str], parts: Iterable[ComponentPart]) -> None:
    """Raise ModelError, naming the nearest, unless the model has each of these components."""
    have = known_components(parts)
    for name in wanted:
        if name not in have:
            raise ModelError(f"the model has no component {name!r}{nearest(name, have)}; it has {', '.join(have)}")


@dataclass(frozen=True)
class _Places:
    """What a model's own structure says of modules outside the blocks."""

    before: frozenset[str]  # paths of modules registered before the first block
    pooler: str | None
    output: str | None

    @classmethod
    def of(cls, model: nn.Module) -> _Places:
        paths = {id(module): path for path, module in model.named_modules()}
        order = list(paths.values())
        stacks = list(find_blocks(model))
        first = min((order.index(stack) for stack in stacks), default=0)
        before = {path for path in order[:first] if not any(within(stack, path) for stack in stacks)}
        base = getattr(model, "base_model", model)  # only a model of transformers has a pooler or output embedding
        pooler = paths.get(id(getattr(base, "pooler", None)))
        output = getattr(model, "get_output_embeddings", lambda: None)()
        return cls(frozenset(before), pooler, paths.get(id(output)))


def _label(site: Site, places: _Places) -> str:
    """The component that a site belongs to."""
    if isinstance(site, NormSite):
        return _norm(site)
    for role, label in LINEARS.items():
        if role in site.roles:
            return label
    if site.layer is not None or "block" in site.roles:
        return "attention" if "attention" in site.roles else _elsewhere(site)
    if places.output is not None and site.path == places.output:
        return "output embedding"
    if places.pooler is not None and within(site.path, places.pooler):
        return "pooler"
    return "embedding" if isinstance(site, EmbeddingSite) or site.path in places.before else _elsewhere(site)


def _elsewhere(site: Site) -> str:
    return "convolution" if isinstance(site, ConvSite) else "other"


def _norm(site: Site) -> str:
    if {"attention", "output"} <= site.roles:
        return "shared LN"
    # "embedding" is also the kind of lookup tables, but a norm has it only by its place
    return next((label for role, label in NORMS.items() if role in site.roles), "other")


def _part(name: str, component: str, term: str, site: Site) -> ComponentPart:
    stack = site.stack if site.layer is not None else ""
    return ComponentPart(name, component, term, site.layer, stack, site.rows, site.transposed)
