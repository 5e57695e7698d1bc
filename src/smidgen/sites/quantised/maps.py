"""Quantised maps as the rest of the library sees them: logical shapes, stored bytes, the weight in real numbers.

Nobody else asks which package stores a weight, or how.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor, nn

from smidgen.common.dtypes import master_dtype
from smidgen.sites.quantised.bitsandbytes_storage import EightBit, FourBit
from smidgen.sites.quantised.counted_map import Counted, CountedMap
from smidgen.sites.quantised.storage import Parts, WeightStorage
from smidgen.sites.quantised.torchao_storage import TensorSubclass

STORAGES: tuple[WeightStorage, ...] = (FourBit(), EightBit(), TensorSubclass(), Counted())


def storage_of(module: nn.Module) -> WeightStorage | None:
    """How a module's weight is stored, None for one of real numbers or none at all."""
    if "weight" not in module._parameters:
        return None
    return next((storage for storage in STORAGES if storage.holds(module)), None)


def quantised_maps(model: nn.Module) -> Iterator[tuple[str, nn.Module, WeightStorage]]:
    """Path, module and storage of each quantised map, in the model's order."""
    for path, module in model.named_modules():
        storage = storage_of(module)
        if storage is not None:
            yield path, module, storage


def scheme_of(model: nn.Module) -> str:
    """The scheme that a model's maps are stored in, the most frequent first if there are several; "" for none."""
    counts = Counter(storage.scheme(module) for _, module, storage in quantised_maps(model))
    return "+".join(name for name, _ in counts.most_common())


def own_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter that a module owns; of a quantised weight, the one that it stands for."""
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    storage = storage_of(module)
    return shapes if storage is None else {**shapes, "weight": storage.shape(module)}


def own_weight(module: nn.Module) -> Tensor | None:
    """A quantised map's weight in real numbers of master precision; None for a module with another weight."""
    storage = storage_of(module)
    if storage is None:
        return None
    weight = storage.dequantised(module)
    return weight.to(master_dtype(weight.dtype))


def logical_shapes(model: nn.Module) -> dict[int, tuple[int, int]]:
    """Identity of each quantised weight -> (width_out, width_in)."""
    return {id(m._parameters["weight"]): s.shape(m) for _, m, s in quantised_maps(model)}


def float_maps(model: nn.Module) -> list[str]:
    """Paths of the linear maps with a weight of real numbers, beside those that are quantised."""
    modules = ((path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear))
    return [path for path, module in modules if storage_of(module) is None]


def logical_counts(model: nn.Module) -> dict[int, int]:
    """Identity of each quantised weight -> number of the values that it stands for."""
    return {key: prod(shape) for key, shape in logical_shapes(model).items()}


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, quantised weights as they are stored, with scales and tables; tied ones once."""
    parts = {id(m._parameters["weight"]): s.parts(m) for _, m, s in quantised_maps(model)}
    return sum(_bytes(parts[id(p)]) if id(p) in parts else p.numel() * p.element_size() for p in model.parameters())


def _bytes(parts: Parts) -> int:
    return sum(part.numel() * part.element_size() for part in parts.values())


def weight_parts(model: nn.Module) -> dict[int, Parts]:
    """Identity of each quantised weight -> the tensors that it is made of."""
    return {id(m._parameters["weight"]): s.parts(m) for _, m, s in quantised_maps(model)}


def quantised_as(scheme: str, weight: Tensor) -> Parts:
    """The parts that a weight of real numbers becomes in a scheme; none if it is not known."""
    found = (storage.quantised(weight, scheme) for storage in STORAGES)
    return next((parts for parts in found if parts is not None), {})


def rewrite(module: nn.Module, weight: Tensor) -> None:
    """Quantise another weight into a quantised map, with the settings that stand there."""
    storage = storage_of(module)
    assert storage is not None
    storage.write(module, weight)


def counted_maps(model: nn.Module) -> dict[int, object]:
    """Identity of each quantised map -> one without content that stands for it in a copy, as deepcopy's memo has it."""
    return {id(module): CountedMap(module, storage) for _, module, storage in quantised_maps(model)}


def share_stored(model: nn.Module, memo: dict[int, object]) -> None:
    """Put into a deepcopy's memo what a copy has in common with this model of its quantised maps."""
    for _, module, storage in quantised_maps(model):
        storage.share(module, memo)


def check_stored(model: nn.Module) -> None:
    """Raises AttachError if a quantised weight is not that of the file any more."""
    for _, module, storage in quantised_maps(model):
        storage.check(module)


def read_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Name of a quantised map's bias -> dtype that the map reads it in, where it casts it."""
    found = {path: s.bias_dtype(m) for path, m, s in quantised_maps(model) if m._parameters.get("bias") is not None}
    return {f"{path}.bias": dtype for path, dtype in found.items() if dtype is not None}
