"""How trained tensors lie in a file: names, packed indices, bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from smidgen.planning.entry import INDICES, PACKED, START, Shape


def is_value(name: str) -> bool:
    """Whether a saved name is that of trained values, not of their indices or start."""
    return not name.endswith((INDICES, START))


def pack_indices(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All `<name>.indices` end to end, in the order of names, as one tensor: headers cost more than numbers."""
    packed = {name: t for name, t in tensors.items() if not name.endswith(INDICES)}
    parts = [t for name, t in sorted(tensors.items()) if name.endswith(INDICES)]
    return {**packed, PACKED: torch.cat(parts)} if parts else packed


def packed_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes that `pack_indices` gives."""
    packed = {name: tuple(shape) for name, shape in shapes.items() if not name.endswith(INDICES)}
    counts = [shape[0] for name, shape in shapes.items() if name.endswith(INDICES)]
    return {**packed, PACKED: (sum(counts),)} if counts else packed


def unpack_indices(tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The inverse of `pack_indices`, given the shapes before it."""
    names = sorted(name for name in shapes if name.endswith(INDICES))
    if not names:
        return dict(tensors)
    parts = tensors[PACKED].split([shapes[name][0] for name in names])
    return {n: t for n, t in tensors.items() if n != PACKED} | dict(zip(names, parts, strict=True))


def safetensors_size(shapes: Mapping[str, Shape], itemsize: int = 4) -> int:
    """Bytes of a safetensors file with these tensors, indices packed: 8 + header padded to 8 + data."""
    header, offset = {}, 0
    # safetensors writes float32 before int32, each in the order of names
    for name, shape in sorted(packed_shapes(shapes).items(), key=lambda item: (item[0] == PACKED, item[0])):
        end = offset + prod(shape) * itemsize
        dtype = "I32" if name == PACKED else "F32"
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset
