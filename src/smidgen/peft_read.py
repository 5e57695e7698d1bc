"""From the tensors of a PEFT adapter to the method that trains exactly these, values by `site.symbol`.

The names of the tensors decide what was trained. A method is accepted only if, on this model, it trains
the same set; otherwise the error says what is left over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.errors import DeltaError, nearest
from smidgen.fields import Layers
from smidgen.heads import head_names
from smidgen.method import Method
from smidgen.methods.ia3 import IA3
from smidgen.methods.ln import LN, WHICH
from smidgen.peft_format import Adapter, check_complete, few
from smidgen.sites import Site, find_sites, shares_layers

Values = dict[str, Tensor]


class Reader:
    """An adapter beside the model that it belongs to."""

    def __init__(self, adapter: Adapter, model: nn.Module) -> None:
        self.adapter, self.model = adapter, model
        self.modules = dict(model.named_modules())
        self.base = dict(model.state_dict())
        head = set(head_names(model))
        self.sites = [s for s in find_sites(model) if not head & {f"{s.path}.{term}" for term, _ in s.terms}]
        self.whole = {site.path: site for site in self.sites if site.rows is None}
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

    def site(self, path: str, kind: str) -> Site:
        """The site at a path; one of another kind, or one in the head, is refused."""
        site = self.whole.get(path)
        if site is None or site.kind != kind:
            what = type(self.modules[path]).__name__ + (" in the head" if site is None else "")
            kinds = {
                "norm": "LN() trains normalisation layers only",
                "linear": "only linear maps are edited here",
            }
            raise self.refusal(f"{path} is {what}; {kinds[kind]}")
        return site

    def layer_choices(self, sites: Iterable[Site]) -> list[Layers]:
        """None first, then the ways to write these layers, as each of the stacks suggests them."""
        stacks: dict[tuple[str, int], set[int]] = {}
        for site in sites if self.layered else ():
            if site.layer is not None:
                stacks.setdefault((site.stack, site.depth), set()).add(site.layer)
        spelled = [choice for (_, depth), found in stacks.items() for choice in _spellings(found, depth)]
        return list(dict.fromkeys([None, *spelled]))

    def pick(
        self, candidates: Iterable[Method], wanted: set[str], names: Callable[[Method, Site], Iterable[str]]
    ) -> Any:
        """The first candidate that trains exactly `wanted`; a refusal names how the nearest differs."""
        nearest_one: tuple[int, Method, set[str]] | None = None
        for method in candidates:
            try:
                got = {name for site in self.sites for name in names(method, site)}
            except ValueError:  # layers that a shallower stack does not have
                continue
            if got == wanted:
                return method
            if nearest_one is None or len(got ^ wanted) < nearest_one[0]:
                nearest_one = (len(got ^ wanted), method, got)
        assert nearest_one is not None
        _, method, got = nearest_one
        raise self.refusal(
            f"no recipe here trains exactly what the file holds; nearest is {method}, which lacks "
            f"{few(wanted - got)} and also trains {few(got - wanted)}"
        )

    def shaped(self, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """The tensor, if it has the shape that the model asks for."""
        if tuple(tensor.shape) != tuple(shape):
            raise self.refusal(f"{name} has shape {tuple(tensor.shape)}, this model needs {tuple(shape)}")
        return tensor

    def refusal(self, text: str) -> DeltaError:
        """An error that names the file."""
        return DeltaError(f"{self.adapter.source}: {text}")


def _spellings(layers: set[int], depth: int) -> Iterator[Layers]:
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
        site = reader.site(path, "norm")
        if set(terms) != {term for term, _ in site.terms}:
            raise reader.refusal(f"{path} comes with {few(terms)}, but this model's has {few(dict(site.terms))}")
        for term, shape in site.terms:
            values[f"{path}.{term}"] = reader.shaped(f"{path}.{term}", terms[term], shape)
        sites.append(site)
    term = _moved_term(reader, sites, values)
    candidates = (LN(which, term, layers) for layers in reader.layer_choices(sites) for which in WHICH)
    kept = {f"{s.path}.{t}" for s in sites for t in LN(terms=term).trains(s)}
    method = reader.pick(candidates, kept, lambda m, s: (f"{s.path}.{t}" for t in m.trains(s)))
    return method, {name: values[name] for name in kept}


def _moved_term(reader: Reader, sites: Sequence[Site], values: Values) -> str:
    """Which term the file changes: "both" unless just one of them is the base's everywhere."""

    def moved(term: str) -> bool:
        names = [f"{s.path}.{getattr(s, term)}" for s in sites if getattr(s, term)]
        return any(not torch.equal(values[n].double(), reader.base[n].double().cpu()) for n in names)

    gain, bias = moved("gain"), moved("bias")
    return "both" if gain == bias or not any(s.bias for s in sites) else "gain" if gain else "bias"


def read_ia3(reader: Reader) -> tuple[Method, Values]:
    """Vectors for keys, values and the second feed-forward map; a fused projection's is cut up."""
    values: dict[str, tuple[Site, Tensor]] = {}
    for path, terms in reader.grouped(".ia3_").items():
        site = reader.site(path, "linear")
        if set(terms) != {"l"}:
            raise reader.refusal(f"{path} holds {few(f'ia3_{t}' for t in terms)}; only ia3_l is known")
        for part, vector in _ia3_parts(reader, site, terms["l"]):
            values[part.name] = (part, vector)
    sites = [site for site, _ in values.values()]
    candidates = (IA3(layers=layers) for layers in reader.layer_choices(sites))
    method = reader.pick(candidates, set(values), lambda m, s: (s.name,) if m.acts(s) else ())
    return method, {f"{name}.l": vector for name, (_, vector) in values.items()}


def _ia3_parts(reader: Reader, site: Site, vector: Tensor) -> Iterator[tuple[Site, Tensor]]:
    """The pieces of a vector that IA3() has a place for; any other must be all ones, which does nothing."""
    if IA3().acts(site):
        shape = (1, site.width_in) if "ff_out" in site.roles else (site.width_out, 1)
        yield site, reader.shaped(f"{site.path}.ia3_l", vector, shape).flatten()
        return
    rest = vector.clone()
    for part in (s for s in reader.sites if s.path == site.path and s.rows and IA3().acts(s)):
        reader.shaped(f"{site.path}.ia3_l", vector, (site.width_out, 1))
        assert part.rows is not None
        yield part, part.rows.take(vector[:, 0])
        rest[part.rows.numbers(len(rest))] = 1
    if not bool((rest == 1).all()):
        raise reader.refusal(
            f"ia3_l of {site.path} scales what is neither key, value nor ff_out; IA3() trains only those"
        )
