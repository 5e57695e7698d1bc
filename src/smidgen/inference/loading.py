"""Names to models: a built-in name, a folder or a hub id -> model with a head shaped by the task, and tokenizer."""

from __future__ import annotations

import os
from collections.abc import Collection
from functools import partial
from typing import Any, Protocol, TypedDict, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from smidgen.common.errors import ModelError
from smidgen.data.kinds.base import TaskKind, kind_named
from smidgen.data.processor import Processor
from smidgen.data.task import Task
from smidgen.delta.delta import Delta
from smidgen.inference.builtin_models import Options, _guarded, _locate
from smidgen.inference.fastest_dtype import fastest
from smidgen.inference.processors import load_processor
from smidgen.inference.quantising import (
    Scheme,
    check_stored_form,
    kept_modules,
    quantised_copy,
    scheme_named,
    settled,
)
from smidgen.inference.task_record import TaskRecord
from smidgen.sites.new_tensors import note_new
from smidgen.sites.quantised.originals import note_originals

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class _LoadingInfo(TypedDict):
    """What `from_pretrained` says it found."""

    missing_keys: Collection[str]
    mismatched_keys: Collection[str | tuple[str, ...]]  # a name, or a name and two shapes


class _ModelClass(Protocol):
    """A class of models of transformers, or one of its Auto classes."""

    def from_pretrained(self, folder: str, **options: object) -> tuple[PreTrainedModel, _LoadingInfo]: ...


def load(
    name: str | os.PathLike[str],
    task: Task | None = None,
    *,
    delta: Delta | None = None,
    dtype: str | torch.dtype = torch.float32,
    seed: int = 0,
    revision: str | None = None,
    quantize: str | None = None,
) -> tuple[PreTrainedModel, Processor]:
    """Load a model and its tokenizer, or other processor.

    A new head is drawn from `seed`, the global generator is left alone.

    Args:
        name: built-in name ("minilm", "smollm2"), folder, .gguf file, or hub id.
        task: shapes the head: class of model, number and names of labels.
        delta: shapes the head for a trained delta instead.
        dtype: of the base; trained values are float32 masters in any case. "auto" is bfloat16 where its matrix
            products are measured to be faster (see `smidgen.inference.fastest_dtype`), else float32.
        quantize: store the linear maps in few bits: "nf4", "nf4-double", "fp4", "fp4-double", "int8" (bitsandbytes),
            "torchao-int8", "torchao-int4", or "none". The head, output layers, embeddings and norms stay in `dtype`.
            By default as the delta was trained, and without one as the checkpoint is.

    Raises:
        ModelError: no such model, or one that does not load; one line.
    """
    scheme = scheme_named(quantize if quantize is not None or delta is None else delta.base.quantised)
    kind, labels = _shape(task, delta)
    name_of_class = delta.info.get("model_class") if delta is not None and kind is None else None
    folder, options = _locate(os.fspath(name))
    options["dtype"] = _dtype(dtype)
    if revision is not None:
        options["revision"] = revision
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _guarded(str(name), lambda: _model(folder, kind, labels, name_of_class, options, scheme))
    processor = load_processor(name, kind, model)
    text = model.config.get_text_config()
    if getattr(text, "pad_token_id", None) is None and hasattr(processor, "pad_token_id"):
        text.pad_token_id = processor.pad_token_id
    if scheme is not None:
        note_originals(model, partial(_plain, folder, kind, labels, name_of_class, options))
    model.config._name_or_path = os.fspath(name)
    return model.eval(), processor


def _shape(task: Task | None, delta: Delta | None) -> tuple[TaskKind | None, tuple[str, ...]]:
    if task is not None:
        return task.task_kind, tuple(task.labels)
    if delta is not None:
        name = TaskRecord.of(delta.info).kind
        return None if name is None else kind_named(name), delta.labels
    return None, ()


def _model(
    folder: str,
    kind: TaskKind | None,
    labels: tuple[str, ...],
    named: str | None,
    options: Options,
    scheme: Scheme | None,
) -> PreTrainedModel:
    """By the task's kind, else by a class's name, else as the checkpoint declares."""
    if kind is not None:
        options = {**options, **kind.head_options(labels)}
    elif labels:
        names = dict(enumerate(labels))
        options = {**options, "id2label": names, "label2id": {label: i for i, label in names.items()}}
    if "gguf_file" in options:  # plain weights, whatever kernels are installed
        options = {**options, "quantization_config": transformers.GgufConfig(dequantize=True)}
    known = getattr(transformers, kind.model_class if kind else named or "", None)
    model_class = cast(_ModelClass, known or _declared(folder, options))
    check_stored_form(folder, options, scheme)
    if scheme is None:
        return settled(_read(model_class, folder, options)[0])
    dtype = cast(torch.dtype, options["dtype"])
    if "gguf_file" in options:
        return quantised_copy(_read(model_class, folder, options)[0], scheme, dtype)
    kept = kept_modules(_skeleton(model_class, folder, options))
    model, lacked = _read(model_class, folder, {**options, "quantization_config": scheme.config(dtype, kept)})
    maps = (path for path, module in model.named_modules() if isinstance(module, nn.Linear))
    if new := [path for path in maps if f"{path}.weight" in lacked and path not in kept]:  # drawn anew, so trained
        again = {**options, "quantization_config": scheme.config(dtype, [*kept, *new])}
        model, _ = _read(model_class, folder, again)
    return settled(model)


def _plain(
    folder: str, kind: TaskKind | None, labels: tuple[str, ...], named: str | None, options: Options
) -> PreTrainedModel:
    """The base in real numbers; what it lacks is drawn, and the global generator left alone."""
    with torch.random.fork_rng(devices=[]):
        return _model(folder, kind, labels, named, options, None)


def _skeleton(model_class: Any, folder: str, options: Options) -> nn.Module:
    """The model without content."""
    own = {key: value for key, value in options.items() if key not in ("dtype", "quantization_config")}
    config = AutoConfig.from_pretrained(folder, **own)
    with torch.device("meta"):
        found: nn.Module = model_class.from_config(config) if "Auto" in model_class.__name__ else model_class(config)
    return found


def _read(model_class: _ModelClass, folder: str, options: Options) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of what the checkpoint lacked or had in another shape."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    lacked = set(info["missing_keys"]) | mismatched
    note_new(model, lacked)
    return model, lacked


def _declared(folder: str, options: Options) -> object:
    """Without a task: the class that the checkpoint was saved as."""
    keys = {k: v for k, v in options.items() if k in ("gguf_file", "revision")}
    fallback = "AutoModelForCausalLM" if "gguf_file" in options else "AutoModel"  # a GGUF file names no class
    names = AutoConfig.from_pretrained(folder, **keys).architectures or [fallback]
    return getattr(transformers, names[0], transformers.AutoModel)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return fastest("cuda" if torch.cuda.is_available() else "cpu").dtype
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
