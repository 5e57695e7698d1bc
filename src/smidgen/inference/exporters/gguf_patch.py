"""A GGUF file with a few tensors replaced: what a delta leaves alone is copied, block by block.

How a tensor of transformers stands in the file (turned round, queries and keys in llama.cpp's order, gains less one) is
not looked up: the base came from the file, so the one way that gives the base's own values in the file is the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smidgen.common.errors import DeltaError
from smidgen.inference.exporters.gguf_types import packed_tensor

Way = Callable[[Tensor], Tensor]


def changed(base: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name -> merged values, in float32, of the parameters that differ from the base's."""
    found = {name: value.detach().float().cpu() for name, value in merged.items()}
    same = {n for n, v in found.items() if n in base and torch.equal(v, base[n].detach().float().cpu())}
    return {name: value for name, value in found.items() if name not in same}


def patched_bytes(source: Path, new: Mapping[str, Tensor]) -> int:
    """At most what the file will take."""
    return source.stat().st_size + 4 * sum(value.numel() for value in new.values())


def write_patched(source: Path, target: Path, base: Mapping[str, Tensor], new: Mapping[str, Tensor], kind: str) -> None:
    """Copy a GGUF file with other values for some tensors: vectors in F32, matrices in `kind`.

    Args:
        base: name in transformers -> the base's values, as they were read from the file.
        new: name in transformers -> values to write.

    Raises:
        DeltaError: a tensor that the file has no place for, or whose values in the file are not the base's.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    arch = str(reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
    numbers = {f"{arch}.{key}": _number(reader, f"{arch}.{key}") for key in ("block_count", "attention.head_count")}
    heads = numbers[f"{arch}.attention.head_count"]
    few = _number(reader, f"{arch}.attention.head_count_kv", heads)
    names = _names(arch, numbers[f"{arch}.block_count"], new)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    replaced = {
        names[name]: _in_file(name, value, base, tensors.get(names[name]), (heads, few), kind)
        for name, value in new.items()
    }
    writer = gguf.GGUFWriter(target, arch, endianess=reader.endianess)
    if (alignment := reader.fields.get(gguf.Keys.General.ALIGNMENT)) is not None:
        writer.data_alignment = alignment.contents()
    for field in reader.fields.values():
        if field.name != gguf.Keys.General.ARCHITECTURE and not field.name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        data, number = replaced.get(tensor.name, (tensor.data, tensor.tensor_type))
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(replaced.get(tensor.name, (tensor.data, None))[0], tensor_endianess=reader.endianess)
    writer.close()


def _number(reader: Any, key: str, default: int = 1) -> int:
    field = reader.fields.get(key)
    found = default if field is None else field.contents()
    return int(max(found)) if isinstance(found, list) else int(found)


def _names(arch: str, blocks: int, new: Mapping[str, Tensor]) -> dict[str, str]:
    """Name in transformers -> name in the file."""
    import gguf

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if arch not in numbers:
        raise DeltaError(
            f"the package gguf does not know the architecture {arch!r} of the base's file; a newer one may"
        )
    table = gguf.get_tensor_name_map(numbers[arch], blocks)
    found = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in new}
    if strange := [name for name, place in found.items() if place is None]:
        raise DeltaError(f"{strange[0]} was trained, and a GGUF file of {arch} has no place for it")
    return {name: str(place) for name, place in found.items()}


def _in_file(
    name: str, value: Tensor, base: Mapping[str, Tensor], tensor: Any, heads: tuple[int, int], kind: str
) -> tuple[Any, Any]:
    """New values of a tensor as the file holds them, and the number of their type."""
    import gguf

    if tensor is None:
        raise DeltaError(
            f"{name} has values of its own now, and the base's file holds none (it is tied to another weight there); "
            "--to safetensors keeps both"
        )
    own = base[name].detach().cpu()
    stored = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    for way in _ways(heads):
        found = way(own)
        if found.shape == stored.shape and torch.equal(found, stored.to(own.dtype)):
            values = way(value).contiguous()
            if values.dim() > 1 and kind == "Q8_0" and values.shape[-1] % 32:
                raise DeltaError(
                    f"{name} has rows of {values.shape[-1]} values, and Q8_0 needs a multiple of 32; try F16"
                )
            return packed_tensor(values.numpy(), "F32" if values.dim() == 1 else kind)
    raise DeltaError(f"the values of {tensor.name} in the base's file are not those of {name}: another file or base")


def _ways(heads: tuple[int, int]) -> list[Way]:
    """How a tensor may stand in a file; the first that gives the file's values is meant."""
    orders = [_in_order(count) for count in dict.fromkeys(heads)]
    return [lambda t: t, *orders, lambda t: t + 1 if t.dim() == 1 else t, lambda t: t.t() if t.dim() == 2 else t]


def _in_order(heads: int) -> Way:
    """llama.cpp's order of the rows of queries or keys: pairs of a rotation side by side."""

    def turned(tensor: Tensor) -> Tensor:
        if tensor.shape[0] % (2 * heads):
            return tensor
        rows = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return rows.transpose(1, 2).reshape(tensor.shape)

    return turned
