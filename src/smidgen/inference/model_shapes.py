"""load_shapes: a model of any size from its configuration alone, with shapes and without content."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import cast

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from smidgen.common.errors import ModelError, nearest
from smidgen.data.task import Task
from smidgen.inference.builtin_models import BUILTIN, _guarded, _locate
from smidgen.inference.loading import _dtype

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
SMALL = 2**30  # bytes of weights that are read rather than only their shapes


def known_shapes() -> tuple[str, ...]:
    """Names of the configurations that come with smidgen: of large models, without weights."""
    folder = resources.files("smidgen.inference") / "architectures"
    return tuple(sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json")))


def load_shapes(
    name: str | os.PathLike[str], task: Task | None = None, *, dtype: str | torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """A model on the meta device, for `plan`: shapes, dtypes and names of its tensors; nothing is read but config.json.

    A class's own head counts as new, since no checkpoint says what it lacks.

    Args:
        name: one of `known_shapes()`, a folder that holds a config.json, or a hub id.
        task: shapes the head: class of model, number of labels.

    Raises:
        ModelError: there is no such configuration, or none that transformers can build; one line.
    """
    named = os.fspath(name)
    config = _guarded(named, lambda: _configured(named))
    kind = None if task is None else task.task_kind
    if kind is not None and task is not None:
        for key, value in kind.head_options(tuple(task.labels)).items():
            setattr(config, key, value)
    model = _guarded(named, lambda: _built(config, kind.model_class if kind else None, _dtype(dtype)))
    model.config._name_or_path = named
    model.eval()
    return model


def needs_shapes_only(name: str) -> bool:
    """Whether a plan is better made without content: there are no weights, or they are above a GiB."""
    if name in known_shapes():
        return True
    folder = Path(name)
    if name in BUILTIN or not (folder / "config.json").is_file():
        return False
    sizes = [path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern)]
    return not sizes or sum(sizes) > SMALL


def _configured(name: str) -> PreTrainedConfig:
    """The configuration of a name: smidgen's own, or that of a folder or the hub."""
    if name in known_shapes():
        text = (resources.files("smidgen.inference") / "architectures" / f"{name}.json").read_text(encoding="utf-8")
        return AutoConfig.for_model(**json.loads(text))
    if "/" not in name and not Path(name).exists() and name not in BUILTIN:
        raise ModelError(
            f"no shapes named {name!r}; there are {', '.join(known_shapes())}{nearest(name, known_shapes())}, "
            "a folder with a config.json, or a hub id"
        )
    folder, options = _locate(name)
    return cast(PreTrainedConfig, AutoConfig.from_pretrained(folder, **options))


def _built(config: PreTrainedConfig, named: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """By the class of the task, else of the checkpoint, else a causal language model or a plain one."""
    names = [named] if named else list(config.architectures or ())
    found = next((cls for cls in (getattr(transformers, str(n), None) for n in names) if cls is not None), None)
    with torch.device("meta"):
        if found is None:
            return cast(PreTrainedModel, transformers.AutoModel.from_config(config, dtype=dtype))
        build = getattr(found, "from_config", None) or found._from_config
        return cast(PreTrainedModel, build(config, dtype=dtype))
