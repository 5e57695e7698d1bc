"""What a model is made of: its sites, norms and buffers, alike things together, and what is left alone and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D

from smidgen.sites.discovery import find_sites
from smidgen.sites.module_calls import never_called, without_gradient
from smidgen.sites.module_kinds import CONVOLUTIONS, kind_of
from smidgen.sites.site import NormSite, Site
from smidgen.sites.unread_parts import unread

MOVING = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Part:
    """Some things of a model that are alike.

    Attributes:
        what: kind of site, class of norm, or class that owns a buffer.
        about: roles of sites, form of a norm, name of a buffer.
        count: how many.
        values: in all of them.
        first: path of the first.
    """

    what: str
    about: str
    count: int
    values: int
    first: str


def parts(model: nn.Module) -> tuple[Part, ...]:
    """Sites by kind and roles; slices of fused maps apart, whose values belong to the whole."""
    entries = []
    for site in find_sites(model):
        roles = " ".join(sorted(site.roles - {"block", site.kind})) or "-"
        about = f"{roles} (rows of a fused map)" if site.rows else roles
        entries.append((site.kind, about, 0 if site.rows else _values(site), site.name))
    return _together(entries)


def norms(model: nn.Module) -> tuple[Part, ...]:
    """Norms by class, form, shape and roles."""
    entries = []
    for site in find_sites(model):
        if isinstance(site, NormSite):
            roles = " ".join(sorted(site.roles - {"block", "norm"})) or "-"
            name = type(model.get_submodule(site.path)).__name__
            entries.append((name, f"{roles}: {_form(site)}", _values(site), site.path))
    return _together(entries)


def _form(site: NormSite) -> str:
    shape = "x".join(map(str, dict(site.terms)[site.gain or site.terms[0][0]]))
    gain = f"1 + {site.gain}" if site.offset else str(site.gain)
    bias = f", {site.bias}" if site.bias else ""
    return f"{gain}{bias} of {shape}" + ("" if site.affine or "x" in shape else ", and more")


def buffers(model: nn.Module) -> tuple[Part, ...]:
    """Buffers by owner and name; those that training moves say so."""
    entries = []
    for path, module in model.named_modules():
        for name, tensor in module._buffers.items():
            if tensor is not None:
                about = f"{name} (moves in training)" if name in MOVING else name
                entries.append((type(module).__name__, about, tensor.numel(), f"{path}.{name}" if path else name))
    return _together(entries)


def left_alone(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Reason -> paths of modules with weights that only training in place reaches, or nothing."""
    found: dict[str, list[str]] = {}
    idle, shut = never_called(model), without_gradient(model)
    for path in shut:
        if next(model.get_submodule(path).parameters(), None) is None:
            continue
        found.setdefault("no gradient passes: under torch.no_grad", []).append(path)
    if closed := unread(model):
        found["never read by this model's class or configuration"] = list(closed)
    for path, module in model.named_modules():
        for reason in _reasons(module, id(module) in idle):
            found.setdefault(reason, []).append(path)
    return {reason: tuple(paths) for reason, paths in found.items()}


def _reasons(module: nn.Module, idle: bool) -> Iterator[str]:
    if idle and kind_of(module) in ("linear", "conv"):
        yield "read and never called"
    elif kind_of(module) != "other":
        return
    elif isinstance(module, (nn.Linear, Conv1D, *CONVOLUTIONS)):
        yield f"{type(module).__name__}: not a plain map of a weight of its own, or not called"
    elif any(p.ndim == 3 and len(p) > 1 for p in _own(module)):
        yield f"{type(module).__name__}: stacked 3-D weights"


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    """A module's own parameters, but for those that another one's weight is made of."""
    return iter(()) if isinstance(module, ParametrizationList) else module.parameters(recurse=False)


def _values(site: Site) -> int:
    return sum(prod(shape) for _, shape in site.terms)


def _together(entries: Iterable[tuple[str, str, int, str]]) -> tuple[Part, ...]:
    """Parts of one kind and description as one: their number, their values, and the path of the first."""
    counts: Counter[tuple[str, str]] = Counter()
    values: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], str] = {}
    for what, about, number, path in entries:
        counts[what, about] += 1
        values[what, about] += number
        first.setdefault((what, about), path)
    return tuple(
        Part(what, about, counts[what, about], values[what, about], path) for (what, about), path in first.items()
    )
