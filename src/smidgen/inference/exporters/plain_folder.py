"""A merged model as a folder of safetensors that transformers loads alone."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from smidgen.common.errors import DeltaError
from smidgen.data.processor import Processor
from smidgen.inference.exporters.equality import ROUNDING, Equality, Inputs, Outputs, compare_outputs, tensor_outputs

TOLERANCE = 1e-3


def parameter_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """What a model's parameters and buffers take, floating ones in `dtype` if it is given."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    sizes = ((t.numel(), dtype.itemsize if dtype and t.is_floating_point() else t.element_size()) for t in tensors)
    return sum(count * size for count, size in sizes)


def write_plain(merged: nn.Module, folder: Path, processor: Processor | None) -> None:
    """Save a merged model and its processor. Raises DeltaError if it is not a model of transformers."""
    if not isinstance(merged, PreTrainedModel):
        raise DeltaError(f"{type(merged).__name__} is not a model of transformers, which alone knows how to be saved")
    merged.save_pretrained(folder)
    write_settings(merged, folder, processor)


def write_settings(merged: nn.Module, folder: Path, processor: Processor | None) -> None:
    """Save a model's configuration and its processor, without the weights."""
    if isinstance(merged, PreTrainedModel):
        merged.config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def check_folder(merged: nn.Module, folder: Path, wanted: list[Outputs], batches: list[Inputs]) -> Equality:
    """Load the folder by transformers alone and compare."""
    dtype = next(merged.parameters()).dtype
    loaded = cast(nn.Module, type(merged).from_pretrained(folder, dtype=dtype))  # type: ignore[attr-defined]
    return compare_outputs(
        lambda batch: tensor_outputs(loaded, [batch])[0], wanted, batches,
        "outputs of the folder, loaded by transformers", TOLERANCE, ROUNDING.get(str(dtype)[6:], 0.0),
    )  # fmt: skip
