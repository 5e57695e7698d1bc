"""From a delta to the tensors and config fields of a PEFT adapter, one function per shared method."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.delta import Delta
from smidgen.errors import DeltaError
from smidgen.method import Method
from smidgen.methods.ia3 import IA3
from smidgen.methods.ln import LN
from smidgen.methods.lora import LoRA
from smidgen.plan import Plan
from smidgen.recipe import Term
from smidgen.sites import Site


class Parts(NamedTuple):
    """Tensors by their names in the file, without PEFT's prefix, and fields of the config."""

    tensors: dict[str, Tensor]
    fields: dict[str, Any]


class Placed(NamedTuple):
    """One site with the tensors that the delta has for it."""

    site: Site
    tensors: dict[str, Tensor]


def placed(delta: Delta, plan: Plan) -> list[Placed]:
    """The delta's tensors, site by site."""
    found = []
    for row in plan.rows:
        found.append(Placed(row.site, {term: delta.tensors[name] for term, name, _ in row.trained()}))
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
    return Parts(tensors, {"peft_type": "LN_TUNING", "target_modules": targets(paths, model)})


def write_lora(method: Method, sites: list[Placed], model: nn.Module) -> Parts:
    """Pairs of matrices; the pairs of a fused projection's slices become one pair of block form.

    A: the slices' A stacked, (k rank, width_in). B: their B on the rows of their slice, zero elsewhere,
    (all rows, k rank). So B A is the slices' products one under the other, exactly.
    """
    assert isinstance(method, LoRA)
    groups: dict[str, list[Placed]] = {}
    for entry in sites:
        groups.setdefault(entry.site.path, []).append(entry)
    counts = {len(group) for group in groups.values()}
    if len(counts) > 1:
        shown = ", ".join(f"{g[0].site.path}: {len(g) * method.rank}" for g in _one_of_each(groups.values()))
        raise DeltaError(
            f"{method}: slices of a fused projection are one pair of a higher rank in PEFT, so one rank "
            f"does not fit all modules ({shown}); target either slices or whole maps"
        )
    rank = method.rank * counts.pop()
    tensors = {}
    for path, group in groups.items():
        tensors[f"{path}.lora_A.weight"] = torch.cat([entry.tensors["A"] for entry in group])
        tensors[f"{path}.lora_B.weight"] = _blocks(group, model)
    alpha = method.scale * rank
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": method.dropout,
        "bias": "none",
        "fan_in_fan_out": any(site.transposed for site, _ in sites),
        "target_modules": targets(groups, model),
    }
    return Parts(tensors, fields)


def _one_of_each(groups: Iterable[list[Placed]]) -> list[list[Placed]]:
    return list({len(group): group for group in groups}.values())


def _blocks(group: list[Placed], model: nn.Module) -> Tensor:
    if group[0].site.rows is None:
        return group[0].tensors["B"]
    columns = []
    for site, tensors in group:
        column = tensors["B"].new_zeros(_width_out(site, model), tensors["B"].shape[1])
        a, b = site.rows or (0, 0)
        column[a:b] = tensors["B"]
        columns.append(column)
    return torch.cat(columns, dim=1)


def write_ia3(method: Method, sites: list[Placed], model: nn.Module) -> Parts:
    """Vectors, as columns on outputs and rows on inputs; ones on a fused projection's other slices."""
    tensors: dict[str, Tensor] = {}
    inner = set()
    for site, values in sites:
        name, vector = f"{site.path}.ia3_l", values["l"]
        if "ff_out" in site.roles:
            inner.add(site.path)
            tensors[name] = vector[None, :]
        elif site.rows is None:
            tensors[name] = vector[:, None]
        else:
            whole = tensors.setdefault(name, vector.new_ones(_width_out(site, model), 1))
            whole[slice(*site.rows), 0] = vector
    paths = {site.path for site, _ in sites}
    wanted, inside = _ia3_targets(paths, inner, model)
    fields = {"target_modules": wanted, "feedforward_modules": inside}
    return Parts(tensors, {"peft_type": "IA3", "fan_in_fan_out": any(s.transposed for s, _ in sites), **fields})


def _ia3_targets(paths: set[str], inner: set[str], model: nn.Module) -> tuple[Any, Any]:
    """PEFT matches feedforward_modules by bare endings of names, and wants them among the targets."""
    wanted = targets(paths, model)
    if isinstance(wanted, list):
        inside = [t for t in wanted if any(p.endswith(t) for p in inner)]
        if {p for p in paths if p.endswith(tuple(inside))} == inner:
            return wanted, inside
        if {p for p in paths if p.endswith(tuple(inner))} == inner:
            return sorted(paths), sorted(inner)
    return _pattern(paths), _pattern(inner)


def _width_out(site: Site, model: nn.Module) -> int:
    """Output width of the whole map that a slice belongs to."""
    shape: tuple[int, ...] = tuple(model.get_submodule(site.path).get_parameter("weight").shape)
    return shape[1] if site.transposed else shape[0]


def targets(paths: Collection[str], model: nn.Module) -> list[str] | str:
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


def task_type(model: nn.Module) -> str | None:
    """PEFT's name for what the model's class does, None where it has none."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if name.endswith("ForConditionalGeneration") and getattr(config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    kinds = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    return next((kind for ending, kind in kinds.items() if name.endswith(ending)), None)


Writer = Callable[[Method, list[Placed], nn.Module], Parts]
WRITERS: Mapping[type[Term], Writer] = {LN: write_ln, LoRA: write_lora, IA3: write_ia3}
