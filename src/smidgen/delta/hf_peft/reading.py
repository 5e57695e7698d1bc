"""From the tensors of a PEFT adapter to the method that trains exactly these, values by `site.symbol`.

The names of the tensors decide what was trained. A method is accepted only if, on this model, it trains
the same set; otherwise the error says what is left over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from smidgen.common.errors import DeltaError, nearest
from smidgen.delta.hf_peft.adapter_files import AdapterFile, check_complete, first_names
from smidgen.methods.base import Method
from smidgen.methods.in_place.ln import LN, WHICH
from smidgen.methods.scaling.ia3 import IA3, INPUTS
from smidgen.sites.discovery import find_sites, shares_layers
from smidgen.sites.roles import within
from smidgen.sites.site import LinearSite, NormSite, OwnerSite, Site
from smidgen.sites.targeting import LINEAR_ROLES, Layers
from smidgen.sites.task_head import head_names
from smidgen.sites.unread_parts import read_sites, unread

Values = dict[str, Tensor]


Kind = TypeVar("Kind", bound=OwnerSite)


class Reader:
    """An adapter beside the model that it belongs to."""

    def __init__(self, adapter: AdapterFile, model: nn.Module) -> None:
        closed = unread(model)  # what an adapter holds there has no effect
        kept = {n: t for n, t in adapter.tensors.items() if not any(within(n, path) for path in closed)}
        self.adapter, self.model = replace(adapter, tensors=kept), model
        self.modules = {n: m for n, m in model.named_modules() if not any(within(n, path) for path in closed)}
        self.base = dict(model.state_dict())
        head = set(head_names(model))
        self.sites = [
            s for s in read_sites(model, find_sites(model)) if not head & {f"{s.path}.{term}" for term, _ in s.terms}
        ]
        self.whole = {site.path: site for site in self.sites if not site.part}
        self.layered = not shares_layers(model)

    def grouped(self, mark: str) -> dict[str, Values]:
        """Module path -> what follows `mark` in the name -> tensor. Every path is a module of the model."""
        found: dict[str, Values] = {}
        for name, tensor in self.adapter.added.items():
            path, _, term = name.rpartition(mark)
            if path not in self.modules:
                raise self.refusal(f"the model has no module {path!r}{nearest(path, self.modules)}")
            found.setdefault(path, {})[term] = tensor
        check_complete(self.adapter, found, self.modules)
        return found

    def norm(self, path: str) -> NormSite:
        """The norm at a path; anything else, or one in the head, is refused."""
        return self._site(path, NormSite, "LN() trains normalisation layers only")

    def map(self, path: str) -> LinearSite:
        """The linear map at a path; anything else, or one in the head, is refused."""
        return self._site(path, LinearSite, "only linear maps are edited here")

    def _site(self, path: str, cls: type[Kind], wanted: str) -> Kind:
        site = self.whole.get(path)
        if not isinstance(site, cls):
            what = type(self.modules[path]).__name__ + (" in the head" if site is None else "")
            raise self.refusal(f"{path} is {what}; {wanted}")
        return site

    def layer_choices(self, sites: Iterable[Site]) -> list[Layers]:
        """None first, then the ways to write these layers, as each of the stacks suggests them."""
        stacks: dict[tuple[str, int], set[int]] = {}
        for site in sites if self.layered else ():
            if site.layer is not None:
                stacks.setdefault((site.stack, site.depth), set()).add(site.layer)
        spelled = [choice for (_, depth), found in stacks.items() for choice in _spellings(found, depth)]
        return list(dict.fromkeys([None, *spelled]))

    def places(self, sites: Sequence[Site]) -> list[tuple[Layers, tuple[str, ...]]]:
        """Layers and names of maps that may say which maps these are: all linear ones, roles, ever longer endings of
        the paths; endings that number the layers come last."""
        roles = tuple(role for role in LINEAR_ROLES if any(role in site.roles for site in sites))
        parts = [site.path.split(".") for site in sites]
        lengths = range(1, max(map(len, parts)) + 1)
        endings = [tuple(sorted({".".join(p[-n:]) for p in parts})) for n in lengths]
        plain = [names for names in endings if not any(c.isdigit() for name in names for c in name.split("."))]
        named = [(layers, names) for layers in self.layer_choices(sites) for names in (("linear",), roles, *plain)]
        return [(layers, names) for layers, names in (*named, *((None, names) for names in endings)) if names]

    def find(
        self, candidates: Iterable[Method], wanted: set[str], names: Callable[[Method, Site], Iterable[str]]
    ) -> Method | None:
        """The first candidate that trains exactly `wanted`."""
        return next((method for method in candidates if self._trained(method, names) == wanted), None)

    def _trained(self, method: Method, names: Callable[[Method, Site], Iterable[str]]) -> set[str] | None:
        try:
            return {name for site in self.sites for name in names(method, site)}
        except ValueError:  # layers that a shallower stack does not have
            return None

    def pick(
        self, candidates: Iterable[Method], wanted: set[str], names: Callable[[Method, Site], Iterable[str]]
    ) -> Method:
        """The first candidate that trains exactly `wanted`; a refusal names how the nearest differs."""
        nearest_one: tuple[int, Method, set[str]] | None = None
        for method in candidates:
            got = self._trained(method, names)
            if got == wanted:
                return method
            if got is None:
                continue
            if nearest_one is None or len(got ^ wanted) < nearest_one[0]:
                nearest_one = (len(got ^ wanted), method, got)
        assert nearest_one is not None
        _, method, got = nearest_one
        raise self.refusal(
            f"no recipe here trains exactly what the file holds; nearest is {method}, which lacks "
            f"{first_names(wanted - got)} and also trains {first_names(got - wanted)}"
        )

    def shaped(self, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """The tensor, if it has the shape that the model asks for."""
        if tuple(tensor.shape) != tuple(shape):
            raise self.refusal(f"{name} has shape {tuple(tensor.shape)}, this model needs {tuple(shape)}")
        return tensor

    def refusal(self, text: str) -> DeltaError:
        """An error that names the file."""
        return DeltaError(f"{self.adapter.source}: {text}")


def one_or_many(names: tuple[str, ...]) -> str | tuple[str, ...]:
    """A single name as itself."""
    return names[0] if len(names) == 1 else names


def _spellings(layers: set[int], depth: int) -> Iterator[Layers]:
    """Values of `layers=` that mean exactly these layers of so many, the shortest way of saying it first."""
    first, last, count = min(layers), max(layers), len(layers)
    if count == 1:
        yield first
    if last - first + 1 == count:
        if last == depth - 1:
            yield f"top:{count}"
        if first == 0:
            yield f"bottom:{count}"
        yield f"{first}:{last + 1}"
    yield tuple(sorted(layers))


def read_ln(reader: Reader) -> tuple[Method, Values]:
    """Whole norms. If all biases (or gains) are the base's own, the recipe trains the other term."""
    values: Values = {}
    sites = []
    for path, terms in reader.grouped(".ln_tuning_layers.").items():
        site = reader.norm(path)
        if set(terms) != {term for term, _ in site.terms}:
            raise reader.refusal(
                f"{path} comes with {first_names(terms)}, but this model's has {first_names(dict(site.terms))}"
            )
        for term, shape in site.terms:
            values[f"{path}.{term}"] = reader.shaped(f"{path}.{term}", terms[term], shape)
        sites.append(site)
    term = _moved_term(reader, sites, values)
    candidates = (LN(which, term, layers) for layers in reader.layer_choices(sites) for which in WHICH)
    kept = {f"{s.path}.{t}" for s in sites for t in LN(terms=term).trains(s)}
    method = reader.pick(candidates, kept, lambda m, s: (f"{s.path}.{t}" for t in m.trains(s)))
    return method, {name: values[name] for name in kept}


def _moved_term(reader: Reader, sites: Sequence[NormSite], values: Values) -> str:
    """Which term the file changes: "both" unless just one of them is the base's everywhere."""

    def moved(term: str) -> bool:
        names = [f"{s.path}.{getattr(s, term)}" for s in sites if getattr(s, term)]
        return any(not torch.equal(values[n].double(), reader.base[n].double().cpu()) for n in names)

    gain, bias = moved("gain"), moved("bias")
    return "both" if gain == bias or not any(s.bias for s in sites) else "gain" if gain else "bias"


def read_ia3(reader: Reader) -> tuple[Method, Values]:
    """Vectors (width_out, 1) on outputs, (1, width_in) on inputs; of a fused projection its slices', or the whole's."""
    whole: dict[str, Scaled] = {}
    for path, terms in reader.grouped(".ia3_").items():
        site = reader.map(path)
        if set(terms) != {"l"}:
            raise reader.refusal(f"{path} holds {first_names(f'ia3_{t}' for t in terms)}; only ia3_l is known")
        inner = len(terms["l"]) == 1 < site.width_out
        shape = (1, site.width_in) if inner else (site.width_out, 1)
        vector = reader.shaped(f"{path}.ia3_l", terms["l"], shape)
        whole[site.name] = Scaled(site, vector.flatten(), inner)
    for found in (_cut(reader, whole), whole):
        wanted = {_place(name, inner) for name, (_, _, inner) in found.items()}
        method = reader.find(_ia3s(reader, found), wanted, _ia3_place)
        if method is not None:
            return method, {f"{name}.l": scaled.vector for name, scaled in found.items()}
    return reader.pick(_ia3s(reader, whole), wanted, _ia3_place), {}  # refuses


class Scaled(NamedTuple):
    """A vector of a file, and whether it scales what enters the site's map."""

    site: Site
    vector: Tensor
    inner: bool


def _place(name: str, inner: bool) -> str:
    return f"the input of {name}" if inner else name


def _ia3_place(method: Method, site: Site) -> tuple[str, ...]:
    return (_place(site.name, method.enters(site)),) if method.acts(site) else ()


def _cut(reader: Reader, whole: Mapping[str, Scaled]) -> dict[str, Scaled]:
    """The same with vectors of fused projections cut up, where all but the slices that IA3() scales are ones."""
    found: dict[str, Scaled] = {}
    for name, (site, vector, inner) in whole.items():
        here = [] if inner else [s for s in reader.sites if s.path == site.path and IA3().acts(s)]
        slices = [(s, rows) for s in here if (rows := s.rows) is not None]
        rest = vector.clone()
        for _, rows in slices:
            rest[rows.numbers(len(rest))] = 1
        if not slices or not bool((rest == 1).all()):
            found[name] = Scaled(site, vector, inner)
        else:
            found |= {part.name: Scaled(part, rows.take(vector), False) for part, rows in slices}
    return found


def _ia3s(reader: Reader, found: Mapping[str, Scaled]) -> Iterator[Method]:
    """The paper's own places; then all choices of maps, beside all choices of those whose input is scaled."""
    sites = [site for site, _, _ in found.values()]
    inner = [site for site, _, inside in found.values() if inside]
    yield from (IA3(layers=layers) for layers in reader.layer_choices(sites))
    scaled = dict.fromkeys((INPUTS, *(one_or_many(names) for _, names in reader.places(inner)))) if inner else ((),)
    for layers, target in reader.places(sites):
        yield from (IA3(layers, one_or_many(target), inputs) for inputs in scaled)
