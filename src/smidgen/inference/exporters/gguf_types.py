"""The types of tensors that are written into a GGUF file."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from smidgen.common.errors import DeltaError, nearest

WRITTEN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "Q8_0": "q8_0"}  # -> what rounding to it costs
OF_DTYPE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F32"}


def written_type(asked: str | None, dtype: torch.dtype) -> str:
    """The type that was asked for, or the one of the base's own dtype.

    Raises:
        DeltaError: the package gguf is missing; no such type, or one that is not written here.
    """
    if importlib.util.find_spec("gguf") is None:
        raise DeltaError("--to gguf needs the package gguf: pip install 'smidgen[gguf]'")
    if asked is None:
        return OF_DTYPE[dtype]
    if asked.upper() in WRITTEN:
        return asked.upper()
    import gguf

    known = {kind.name for kind in gguf.GGMLQuantizationType} | {"Q4_K_M", "Q4_K_S", "Q5_K_M", "Q5_K_S", "Q3_K_M"}
    listed = ", ".join(WRITTEN)
    if asked.upper() in known:
        raise DeltaError(
            f"{asked} is not written here, but by llama.cpp: export as F32 or F16, then `llama-quantize model.gguf "
            f"small.gguf {asked.upper()}`; written here: {listed}"
        )
    raise DeltaError(f"GGUF has no type {asked!r}{nearest(asked, known | set(WRITTEN))}; written here: {listed}")


def packed_tensor(values: Any, kind: str) -> tuple[Any, Any]:
    """An array in float32 as the file holds it, and the type's number: bytes of blocks, unless it is F32 or F16."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    if kind == "F32":
        return values, number
    if kind == "F16":
        return values.astype("float16"), number
    return gguf.quants.quantize(values, number), number
