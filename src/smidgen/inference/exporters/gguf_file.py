"""A merged causal language model as a GGUF file, and the check that transformers reads the same model from it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn

from smidgen.common.errors import DeltaError
from smidgen.inference.builtin_models import _locate
from smidgen.inference.exporters.equality import ROUNDING, Equality, Inputs, Outputs, compare_outputs, tensor_outputs
from smidgen.inference.exporters.gguf_types import WRITTEN
from smidgen.inference.exporters.onnx_file import writes_text

FILE = "model.gguf"
TOLERANCE = 1e-2


def refuse_gguf(model: nn.Module) -> None:
    """Raises DeltaError if a model is not one that llama.cpp writes text with."""
    if not writes_text(model) or _config(model).is_encoder_decoder:
        raise DeltaError(
            f"--to gguf is for causal language models, and this is a {type(model).__name__}; --to safetensors or "
            "--to onnx would work"
        )


def source_file(model: nn.Module) -> Path | None:
    """The GGUF file that a base came from, if it is there."""
    name = str(getattr(_config(model), "_name_or_path", ""))
    folder, options = _locate(name) if name else ("", {})
    file = Path(folder) / str(options["gguf_file"]) if "gguf_file" in options else None
    return file if file is not None and file.is_file() else None


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


def check_gguf(merged: nn.Module, folder: Path, kind: str, wanted: list[Outputs], batches: list[Inputs]) -> Equality:
    """Load the file by transformers and compare. Raises DeltaError if transformers cannot read it."""
    with tempfile.TemporaryDirectory() as empty:
        try:
            loaded = cast(Any, type(merged)).from_pretrained(
                folder, gguf_file=FILE, dtype=torch.float32, cache_dir=empty,
                quantization_config=transformers.GgufConfig(dequantize=True),
            )  # fmt: skip
        except (ValueError, KeyError, NotImplementedError) as error:
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise DeltaError(f"not exported: transformers cannot read the file to check it ({line[:200]})") from error
    return compare_outputs(
        lambda batch: tensor_outputs(loaded, [batch])[0], wanted, batches,
        "outputs of the file, loaded by transformers", TOLERANCE, ROUNDING[WRITTEN[kind]],
    )  # fmt: skip
