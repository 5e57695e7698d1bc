"""smidgen export: a trained result for another program, with the comparison that it had to pass."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import smidgen as sm
from smidgen.cli.options import Base, DeltaFolder, Exports, Json, Option, Out, OwnDtype, open_delta
from smidgen.cli.views import results


def run_export(
    delta: DeltaFolder,
    to: Annotated[Exports, Option("--to", help="what to write")],
    out: Out,
    model: Base = None,
    gguf_type: Annotated[str | None, Option("--type", help="gguf: F32, F16, BF16, Q8_0; default: the base's")] = None,
    converter: Annotated[
        Path | None, Option("--converter", help="gguf: llama.cpp's convert_hf_to_gguf.py, for other bases")
    ] = None,
    dtype: OwnDtype = None,
    as_json: Json = False,
) -> None:
    """Write a delta for another program: merged safetensors, a PEFT adapter, GGUF, ONNX. Checked before it is there."""
    trained, network, processor = open_delta(delta, model, dtype)
    done = sm.export(
        network, out, to.value, delta=trained, processor=processor, gguf_type=gguf_type, converter=converter
    )
    report = {**done.to_json(), "out": str(out), "files": results.sizes(out)}
    results.show(report, results.exported(done), as_json)
