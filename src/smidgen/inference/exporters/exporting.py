"""export: a trained result as files of another program, which are there only if they compute the same."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from smidgen.common.atomic_files import write_files
from smidgen.common.errors import DeltaError, nearest
from smidgen.common.wrappers import bare
from smidgen.data.processor import Processor
from smidgen.delta.attaching import attached, remove
from smidgen.delta.delta import Delta
from smidgen.delta.hf_peft.conversion import from_peft, to_peft
from smidgen.delta.merging import merge
from smidgen.inference.exporters import gguf_convert, gguf_file, gguf_patch, onnx_file, plain_folder
from smidgen.inference.exporters.equality import (
    Equality,
    Inputs,
    Outputs,
    check_batches,
    compare_outputs,
    tensor_outputs,
)
from smidgen.inference.exporters.gguf_types import written_type
from smidgen.inference.exporters.output_folder import RECORD, new_folder
from smidgen.inference.processors import processor_of
from smidgen.ports.attachment_record import base_tensors, is_attached
from smidgen.ports.in_place.shared_parameters import shared_copy
from smidgen.sites.new_tensors import keep_note

ADAPTER_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Exported:
    """What `export` wrote, and how near its outputs are to those of the attached model."""

    out: Path
    to: str
    recipe: str
    files: dict[str, int]  # name -> bytes
    equality: Equality

    def __str__(self) -> str:
        return f"{self.recipe} as {self.to} in {self.out}; {self.equality}"

    def to_json(self) -> dict[str, object]:
        """For the command line, and as the folder's record."""
        return {"to": self.to, "recipe": self.recipe, "files": self.files, "equality": asdict(self.equality)}


@dataclass(frozen=True)
class _Work:
    """What is exported, and what it has to compute."""

    base: nn.Module  # with nothing attached
    delta: Delta
    processor: Processor | None
    gguf_type: str | None
    converter: str | os.PathLike[str] | None
    batches: list[Inputs]
    wanted: list[Outputs]


@dataclass(frozen=True)
class _Prepared:
    """An export of which everything is known that could be refused."""

    needed: int  # bytes on the disk
    write: Callable[[Path], Equality]


def export(
    model: nn.Module,
    out: str | os.PathLike[str],
    to: str = "safetensors",
    delta: Delta | None = None,
    processor: Processor | None = None,
    gguf_type: str | None = None,
    converter: str | os.PathLike[str] | None = None,
) -> Exported:
    """Write a trained result for another program, load it again, and compare its outputs with the attached model's.

    The folder appears whole, behind the comparison, or not at all; an earlier export in it is replaced.

    Args:
        model: the base, or what something is attached to; it is not touched.
        out: folder to write, new or of an earlier export.
        to: "safetensors" (merged; transformers loads it alone), "peft" (an adapter), "gguf" (merged, llama.cpp; of a
            base that came from a GGUF file the changed tensors alone are written anew), "onnx" (merged; encoders).
        delta: what to export; None for what is attached.
        processor: written beside it; by default the one that the model's name leads to, where a format needs it.
        gguf_type: F32, F16, BF16 or Q8_0, for the matrices that are written; by default as the base is in memory.
        converter: llama.cpp's convert_hf_to_gguf.py, for a base that did not come from a GGUF file.

    Raises:
        AttachError: a method that cannot be merged, or nothing is attached.
        DeltaError: a format or type that does not exist or does not suit the model, a folder that holds something else,
            a package that is missing, or outputs that differ.
        WriteError: not enough disk, or a folder that cannot be written.
    """
    if to not in FORMATS:
        raise DeltaError(f"no export is called {to!r}{nearest(to, FORMATS)}; known: {', '.join(FORMATS)}")
    if to != "gguf" and (gguf_type is not None or converter is not None):
        raise DeltaError(f"a GGUF type and a converter are for to='gguf', not for {to!r}")
    base, delta = _parted(bare(model), delta)
    for refuse in REFUSALS.get(to, ()):
        refuse(base)
    batches = check_batches(base, processor)
    with attached(base, delta):
        wanted = tensor_outputs(base, batches)
    prepared = FORMATS[to](_Work(base, delta, processor, gguf_type, converter, batches, wanted))
    out = Path(out)
    with new_folder(out, prepared.needed) as folder:
        equality = prepared.write(folder)
        equality.check()
        files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
        done = Exported(out, to, str(delta.recipe), files, equality)
        write_files(folder, {RECORD: json.dumps(done.to_json(), indent=1).encode()})
    return done


def _parted(model: nn.Module, delta: Delta | None) -> tuple[nn.Module, Delta]:
    """The base in its own tensors, with nothing attached, and what is exported. AttachError if that is nothing."""
    if delta is not None and not is_attached(model):
        return model, delta
    delta = Delta.of(model) if delta is None else delta
    twin = shared_copy(model)
    remove(twin)
    return keep_note(model, twin).eval(), delta


def _safetensors(work: _Work) -> _Prepared:
    merged = merge(work.base, work.delta)

    def write(folder: Path) -> Equality:
        plain_folder.write_plain(merged, folder, work.processor)
        return plain_folder.check_folder(merged, folder, work.wanted, work.batches)

    return _Prepared(plain_folder.parameter_bytes(merged), write)


def _peft(work: _Work) -> _Prepared:
    """An adapter, read again as `convert` reads one."""

    def write(folder: Path) -> Equality:
        to_peft(work.delta, work.base, folder)
        again = from_peft(folder, work.base)

        def run(batch: Inputs) -> Outputs:
            with attached(work.base, again):
                return tensor_outputs(work.base, [batch])[0]

        return compare_outputs(
            run, work.wanted, work.batches, "outputs with the adapter, read again", ADAPTER_TOLERANCE
        )

    return _Prepared(sum(tensor.nbytes for tensor in work.delta.tensors.values()), write)


def _gguf(work: _Work) -> _Prepared:
    """Of a base from a GGUF file the changed tensors; else all of it, by llama.cpp's converter."""
    source = None if work.converter else gguf_file.source_file(work.base)
    kind = written_type(work.gguf_type, next(work.base.parameters()).dtype)
    converter = gguf_convert.find_converter(work.converter) if source is None else None
    merged = merge(work.base, work.delta, dtype=torch.float32)
    base = base_tensors(work.base)
    new = gguf_patch.changed(base, dict(merged.named_parameters()))
    whole = plain_folder.parameter_bytes(merged)

    def write(folder: Path) -> Equality:
        target = folder / gguf_file.FILE
        if source is not None:
            gguf_patch.write_patched(source, target, base, new, kind)
        elif converter is not None:
            plain = folder / "plain"
            plain_folder.write_plain(merged, plain, work.processor or processor_of(work.base))
            gguf_convert.run_converter(converter, plain, target, kind)
            shutil.rmtree(plain)
        return gguf_file.check_gguf(merged, folder, kind, work.wanted, work.batches)

    return _Prepared(gguf_patch.patched_bytes(source, new) if source else 2 * whole, write)


def _onnx(work: _Work) -> _Prepared:
    merged = merge(work.base, work.delta)

    def write(folder: Path) -> Equality:
        names = onnx_file.write_onnx(merged, folder, work.batches[0])
        plain_folder.write_settings(merged, folder, work.processor)
        return onnx_file.check_onnx(folder, names, work.wanted, work.batches)

    return _Prepared(plain_folder.parameter_bytes(merged), write)


FORMATS: Mapping[str, Callable[[_Work], _Prepared]] = {
    "safetensors": _safetensors,
    "peft": _peft,
    "gguf": _gguf,
    "onnx": _onnx,
}
REFUSALS: Mapping[str, tuple[Callable[[nn.Module], None], ...]] = {
    "gguf": (gguf_file.refuse_gguf,),
    "onnx": (onnx_file.refuse_onnx,),
}
