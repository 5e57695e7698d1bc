"""A merged encoder as an ONNX file with free batch and length, and the check in ONNX Runtime."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from smidgen.common.errors import DeltaError
from smidgen.inference.exporters.equality import Equality, Inputs, Outputs, compare_outputs, tensor_outputs

FILE = "model.onnx"
TOLERANCE = 1e-4
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def writes_text(model: nn.Module) -> bool:
    """Whether a model is one that transformers generates with."""
    return isinstance(model, PreTrainedModel) and bool(model.can_generate())


def refuse_onnx(model: nn.Module) -> None:
    """Raises DeltaError where the packages are missing, or a model writes text or is not in float32."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DeltaError(f"--to onnx needs {', '.join(missing)}: pip install 'smidgen[onnx]'")
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or writes_text(model):
        raise DeltaError(
            f"--to onnx is for encoders, and {type(model).__name__} writes text token by token; --to safetensors or "
            "--to gguf would work"
        )
    dtype = next(model.parameters()).dtype
    if dtype != torch.float32:
        raise DeltaError(f"--to onnx is for a base in float32, and this one is in {str(dtype)[6:]}; load it in float32")


def write_onnx(merged: nn.Module, folder: Path, example: Inputs) -> list[str]:
    """Write the file; returns the names of its outputs.

    Raises:
        DeltaError: torch cannot trace the model; with the first line of what it says.
    """
    names = list(tensor_outputs(merged, [example])[0])
    free = {k: {0: torch.export.Dim.DYNAMIC, **_length(v)} for k, v in example.items()}
    silenced = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of packages that torch would know operators of
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own making
            program: Any = torch.onnx.export(
                merged.eval(), (), kwargs=dict(example), dynamo=True, dynamic_shapes=free, verbose=False,
                input_names=list(example), output_names=names,
            )  # fmt: skip
            program.save(str(folder / FILE))
    except Exception as error:  # whatever tracing says to a model that it cannot follow
        reason = next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)
        raise DeltaError(f"torch cannot write {type(merged).__name__} as ONNX: {reason[:200]}") from error
    finally:
        logging.disable(silenced)
    return names


def _length(value: torch.Tensor) -> dict[int, Any]:
    """The length is free where an input is of tokens."""
    return {1: torch.export.Dim.DYNAMIC} if value.dim() == 2 and not value.is_floating_point() else {}


def check_onnx(folder: Path, names: list[str], wanted: list[Outputs], batches: list[Inputs]) -> Equality:
    """Run the file in ONNX Runtime and compare."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])

    def run(batch: Inputs) -> Outputs:
        found = session.run(names, {k: v.numpy() for k, v in batch.items()})
        return {name: torch.from_numpy(value).float() for name, value in zip(names, found, strict=True)}

    return compare_outputs(
        run, wanted, batches, f"outputs of the file in ONNX Runtime {onnxruntime.__version__}", TOLERANCE
    )
