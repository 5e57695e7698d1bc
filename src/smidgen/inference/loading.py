"""Names to models: a built-in name, a folder or a hub id -> model with a head shaped by the task, and tokenizer."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Protocol, TypedDict, cast

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from smidgen.common.errors import ModelError
from smidgen.data.kinds.base import TaskKind, kind_named
from smidgen.data.processor import Processor
from smidgen.data.task import Task
from smidgen.delta.delta import Delta
from smidgen.inference.builtin_models import Options, _guarded, _locate
from smidgen.inference.fastest_dtype import fastest
from smidgen.inference.processors import load_processor
from smidgen.inference.task_record import TaskRecord
from smidgen.sites.new_tensors import note_new

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
) -> tuple[PreTrainedModel, Processor]:
    """Load a model and its tokenizer, or other processor.

    A new head is drawn from `seed`, the global generator is left alone.

    Args:
        name: built-in name ("minilm", "smollm2"), folder, .gguf file, or hub id.
        task: shapes the head: class of model, number and names of labels.
        delta: shapes the head for a trained delta instead.
        dtype: of the base; trained values are float32 masters in any case. "auto" is bfloat16 where its matrix
            products are measured to be faster (see `smidgen.inference.fastest_dtype`), else float32.

    Raises:
        ModelError: no such model, or one that does not load; one line.
    """
    kind, labels = _shape(task, delta)
    name_of_class = delta.info.get("model_class") if delta is not None and kind is None else None
    folder, options = _locate(os.fspath(name))
    options["dtype"] = _dtype(dtype)
    if revision is not None:
        options["revision"] = revision
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _guarded(str(name), lambda: _model(folder, kind, labels, name_of_class, options))
    processor = load_processor(name, kind, model)
    text = model.config.get_text_config()
    if getattr(text, "pad_token_id", None) is None and hasattr(processor, "pad_token_id"):
        text.pad_token_id = processor.pad_token_id
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
    folder: str, kind: TaskKind | None, labels: tuple[str, ...], named: str | None, options: Options
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
    model, info = model_class.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    note_new(model, set(info["missing_keys"]) | mismatched)
    return model


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
