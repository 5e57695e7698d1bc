"""From a delta to the tensors and config fields of a PEFT adapter, one function per shared method."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.common.errors import DeltaError
from smidgen.delta.delta import Delta
from smidgen.delta.hf_peft.adapter_files import task_type
from smidgen.methods.base import Method
from smidgen.planning.entry import START
from smidgen.planning.plans import Plan
from smidgen.sites.site import Site

Targets = list[str] | str  # names, or a pattern


class Parts(NamedTuple):
    """Tensors by their names in the file, without PEFT's prefix, and fields of the config."""

    tensors: dict[str, Tensor]
    fields: dict[str, object]


class Placed(NamedTuple):
    """One site with the tensors that the delta has for it."""

    site: Site
    tensors: dict[str, Tensor]


def placed(delta: Delta, plan: Plan) -> list[Placed]:
    """The delta's tensors, site by site; a start that the formula needs is `A0` beside `A`."""
    found = []
    for entry in plan.entries:
        tensors = {term: delta.tensors[name] for term, name, _ in entry.trained()}
        starts = {f"{term}0": delta.tensors[entry.name(term) + START] for term in entry.kept}
        found.append(Placed(entry.site, tensors | starts))
    return found


def write_ln(method: Method, sites: list[Placed], model: nn.Module) -> Parts:
    """Whole norms, as PEFT keeps them: a term that was not trained is written with the base's value."""
    tensors = {}
    for site, trained in sites:
        module = model.get_submodule(site.path)
        for term, _ in site.terms:
            value = trained[term] if term in trained else module.get_parameter(term).detach().float()
            tensors[f"{site.path}.ln_tuning_layers.{term}"] = value
    paths = {site.path for site, _ in sites}
    return Parts(tensors, {"peft_type": "LN_TUNING", "target_modules": spelled_targets(paths, model)})


def write_ia3(method: Method, sites: list[Placed], model: nn.Module) -> Parts:
    """Vectors, as columns on outputs and rows on inputs; ones on a fused projection's other slices."""
    tensors: dict[str, Tensor] = {}
    inner = set()
    for site, values in sites:
        name, vector = f"{site.path}.ia3_l", values["l"]
        if method.enters(site):
            inner.add(site.path)
            tensors[name] = vector[None, :]
        elif (rows := site.rows) is None:
            tensors[name] = vector[:, None]
        else:
            whole = tensors.setdefault(name, vector.new_ones(whole_width(site, model), 1))
            whole[rows.numbers(len(whole)), 0] = vector
    paths = {site.path for site, _ in sites}
    wanted, inside = _ia3_targets(paths, inner, model)
    fields = {"target_modules": wanted, "feedforward_modules": inside}
    return Parts(tensors, {"peft_type": "IA3", "fan_in_fan_out": any(s.transposed for s, _ in sites), **fields})


def _ia3_targets(paths: set[str], inner: set[str], model: nn.Module) -> tuple[Targets, Targets]:
    """PEFT matches feedforward_modules by bare endings of names, and wants them among the targets."""
    wanted = spelled_targets(paths, model)
    if isinstance(wanted, list):
        inside = [t for t in wanted if any(p.endswith(t) for p in inner)]
        if {p for p in paths if p.endswith(tuple(inside))} == inner:
            return wanted, inside
        if {p for p in paths if p.endswith(tuple(inner))} == inner:
            return sorted(paths), sorted(inner)
    return _pattern(paths), _pattern(inner)


def whole_width(site: Site, model: nn.Module) -> int:
    """Output width of the whole map that a slice belongs to."""
    shape: tuple[int, ...] = tuple(model.get_submodule(site.path).get_parameter("weight").shape)
    return shape[1] if site.transposed else shape[0]


def spelled_targets(paths: Collection[str], model: nn.Module) -> Targets:
    """`target_modules` that hit exactly these modules: last names, else whole paths, else a pattern."""
    modules = [name for name, _ in model.named_modules()]
    for choice in ({path.rpartition(".")[2] for path in paths}, set(paths)):
        endings = tuple(f".{name}" for name in choice)
        if {m for m in modules if m in choice or m.endswith(endings)} == set(paths):
            return sorted(choice)
    return _pattern(paths)


def _pattern(paths: Collection[str]) -> str:
    return "|".join(re.escape(path) for path in sorted(paths)) or "(?!)"


def write_head(delta: Delta, model: nn.Module) -> Parts:
    """The head's modules, each whole, and the task_type by which PEFT finds them.

    Raises:
        DeltaError: PEFT, which goes by endings of names, would take another module for the head.
    """
    task = task_type(model)
    modules = sorted({_head_module(name, model) for name in delta.head})
    own = {f"{m}.{k}": v for m in modules for k, v in model.get_submodule(m).state_dict().items()}
    endings = (*modules, *(("classifier", "score") if task in ("SEQ_CLS", "TOKEN_CLS") else ()))
    hit = {name for name, _ in model.named_modules() if endings and name.endswith(endings)}
    if hit != set(modules):
        raise DeltaError(
            f"PEFT finds a head by the endings {', '.join(endings)} of module names, which in "
            f"{type(model).__name__} also hit {', '.join(sorted(hit - set(modules))[:3])}"
        )
    tensors = {name: delta.tensors.get(name, value) for name, value in own.items()}
    return Parts(tensors, {"task_type": task, "modules_to_save": modules or None})


def _head_module(name: str, model: nn.Module) -> str:
    """The module that PEFT keeps whole: the model's own child, or inside the base the tensor's owner."""
    inside = isinstance(model, PreTrainedModel) and name.startswith(model.base_model_prefix + ".")
    path = name.rpartition(".")[0] if inside else name.split(".")[0] if "." in name else ""
    if not path:
        raise DeltaError(f"the head's {name} belongs to no module of its own, so PEFT cannot store it")
    return path
