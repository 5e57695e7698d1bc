"""LoRA, DoRA and PiSSA, to and from PEFT's LORA adapters.

PEFT reads and writes one pair of matrices per module. A DoRA is that with `lora_magnitude_vector`. A PiSSA of rank r,
whose base keeps its weights here, is a LoRA of rank 2r: B A - B0 A0 = [B, -B0] [A; A0].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from smidgen.common.errors import DeltaError
from smidgen.delta.hf_peft.adapter_files import first_names
from smidgen.delta.hf_peft.reading import Reader, Values, one_or_many
from smidgen.delta.hf_peft.writing import Parts, Placed, spelled_targets, whole_width
from smidgen.methods.base import Method
from smidgen.methods.low_rank.dora import DoRA
from smidgen.methods.low_rank.lora import LoRA
from smidgen.methods.low_rank.pissa import PiSSA
from smidgen.ports.in_place.attached_weights import stored
from smidgen.sites.site import ConvSite, Site, TableSite, WeightSite

NAMES = {"A.weight": "A", "B.weight": "B", "magnitude_vector": "m"}  # what follows `lora_` -> symbol
GAP = 1e-4  # the least gap of singular values, over the first, at which float32 tells their vectors apart to 1e-3


def read_lora(reader: Reader) -> tuple[Method, Values]:
    """Pairs of matrices, with the magnitudes of a DoRA; rank from the tensors, strength from the config."""
    groups, cls = reader.grouped(".lora_"), _class_of(reader)
    wanted = {name for name, symbol in NAMES.items() if symbol != "m" or cls is DoRA}
    values, ranks, sites = {}, set(), []
    for path, terms in groups.items():
        site = reader.map(path)
        if set(terms) != wanted:
            found, known = first_names(f"lora_{t}" for t in terms), " and ".join(f"lora_{t}" for t in sorted(wanted))
            raise reader.refusal(f"{path} holds {found}; a {cls.__name__} has {known}")
        rank = len(terms["A.weight"])
        shapes = {"A": (rank, site.width_in), "B": (site.width_out, rank), "m": (site.width_out,)}
        for name, tensor in terms.items():
            values[f"{path}.{NAMES[name]}"] = reader.shaped(f"{path}.lora_{name}", tensor, shapes[NAMES[name]])
        ranks.add(rank)
        sites.append(site)
    if len(ranks) > 1:
        raise reader.refusal(f"rank_pattern gives the ranks {first_names(map(str, ranks))}; a recipe here has one rank")
    (rank,) = ranks
    if cls is PiSSA:
        _check_starts(reader, sites, rank)
    like = _strengths(reader, cls(rank=rank))
    candidates = (replace(like, target=one_or_many(t), layers=layers) for layers, t in reader.places(sites))
    return reader.pick(candidates, set(groups), lambda m, s: (s.name,) if m.acts(s) else ()), values


def _class_of(reader: Reader) -> type[LoRA]:
    """Which of the methods the config means. A PiSSA is read where PEFT itself would compute the same start again."""
    config = reader.adapter.config
    pissa = config.get("init_lora_weights") == "pissa"
    if pissa and config.get("use_dora"):
        raise reader.refusal("use_dora=True with init_lora_weights='pissa' has no counterpart here")
    return DoRA if config.get("use_dora") else PiSSA if pissa else LoRA


def _check_starts(reader: Reader, sites: Sequence[Site], rank: int) -> None:
    """Refuse a PiSSA whose start, which the file lacks, is not a function of the base alone."""
    for site in sites:
        dtype = reader.base[f"{site.path}.weight"].dtype
        if dtype != torch.float32:
            raise reader.refusal(
                f"init_lora_weights='pissa' on a {str(dtype)[6:]} base: PEFT rounds what is left of {site.path} to it "
                "(or refuses it); load the base in float32"
            )
        S = torch.linalg.svdvals(reader.base[f"{site.path}.weight"])
        if rank < len(S) and S[rank - 1] - S[rank] < GAP * S[0]:
            raise reader.refusal(
                f"init_lora_weights='pissa': singular values {rank} and {rank + 1} of {site.path} are equal in "
                "float32, so its start is not determined; save it in PEFT as a plain LoRA "
                "(path_initial_model_for_weight_conversion) first"
            )


def _strengths(reader: Reader, method: LoRA) -> LoRA:
    """The method with the config's strength and dropout."""
    config = reader.adapter.config
    alpha = config["lora_alpha"]
    if any(value != alpha for value in (config.get("alpha_pattern") or {}).values()):
        raise reader.refusal(f"alpha_pattern={config['alpha_pattern']} sets several strengths; a recipe has one alpha")
    scaling = "rslora" if config.get("use_rslora") else method.scaling
    return replace(method, alpha=alpha, dropout=config.get("lora_dropout", 0.0), scaling=scaling)


def write_lora(method: Method, sites: list[Placed], model: nn.Module) -> Parts:
    """Pairs of matrices; the pairs of a fused projection's slices become one pair of block form.

    A: the slices' A stacked, (k rank, width_in). B: their B on the rows of their slice, zero elsewhere,
    (all rows, k rank). So B A is the slices' products one under the other, exactly.
    """
    assert isinstance(method, LoRA)
    if others := [site.path for site, _ in sites if isinstance(site, TableSite | ConvSite | WeightSite)]:
        raise DeltaError(f"{method} at {others[0]}, no linear map, is not written in PEFT's format; keep the delta")
    groups: dict[str, list[Placed]] = {}
    for site, values in sites:
        groups.setdefault(site.path, []).append(Placed(site, _pair(method, values)))
    counts = {len(group) for group in groups.values()}
    if len(counts) > 1:
        shown = ", ".join(f"{g[0].site.path}: {len(_stacked(g))}" for g in _one_of_each(groups.values()))
        raise DeltaError(
            f"{method}: slices of a fused projection are one pair of a higher rank in PEFT, so one rank "
            f"does not fit all modules ({shown}); target either slices or whole maps"
        )
    tensors: dict[str, Tensor] = {}
    for path, group in groups.items():
        tensors[f"{path}.lora_A.weight"] = _stacked(group)
        tensors[f"{path}.lora_B.weight"] = _spread(group, model)
        if isinstance(method, DoRA):
            tensors[f"{path}.lora_magnitude_vector"] = _lengths(group, model)
    rank = len(_stacked(next(iter(groups.values()))))
    fields = {
        "peft_type": "LORA",
        "lora_dropout": method.dropout,
        "bias": "none",
        "fan_in_fan_out": any(site.transposed for site, _ in sites),
        "target_modules": spelled_targets(groups, model),
        "use_dora": isinstance(method, DoRA),
    }
    return Parts(tensors, fields | _strength(method, rank))


def _pair(method: LoRA, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT multiplies: A and B, behind which a PiSSA's start stands with its sign turned."""
    if not isinstance(method, PiSSA):
        return values
    return {"A": torch.cat((values["A"], values["A0"])), "B": torch.cat((values["B"], -values["B0"]), dim=1)}


def _strength(method: LoRA, rank: int) -> dict[str, object]:
    """r, lora_alpha and use_rslora with the method's scale at a rank that blocks may have raised."""
    root = method.scaling == "rslora"
    alpha = method.rank if method.alpha is None else method.alpha
    if rank != method.rank:
        alpha = method.scale * (math.sqrt(rank) if root else rank)
    return {"r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "use_rslora": root}


def _one_of_each(groups: Iterable[list[Placed]]) -> list[list[Placed]]:
    return list({len(group): group for group in groups}.values())


def _stacked(group: list[Placed]) -> Tensor:
    return torch.cat([entry.tensors["A"] for entry in group])


def _spread(group: list[Placed], model: nn.Module) -> Tensor:
    columns = []
    for site, tensors in group:
        column = tensors["B"].new_zeros(whole_width(site, model), tensors["B"].shape[1])
        columns.append(tensors["B"] if (rows := site.rows) is None else rows.put(column, tensors["B"]))
    return torch.cat(columns, dim=1)


def _lengths(group: list[Placed], model: nn.Module) -> Tensor:
    """Lengths of all rows: those that no slice trains keep their own, so that PEFT multiplies them by 1."""
    site, tensors = group[0]
    if not site.part:
        return tensors["m"]
    weight, _ = stored(model.get_submodule(site.path))
    whole: Tensor = torch.linalg.vector_norm(weight.T if site.transposed else weight, dim=1).to(tensors["m"])
    for part, values in group:
        whole = whole if (rows := part.rows) is None else rows.put(whole, values["m"])
    return whole
