"""The processor that belongs to a model or a name."""

from __future__ import annotations

import os
from typing import cast

import transformers
from torch import nn

from smidgen.common.errors import ModelError
from smidgen.common.wrappers import bare
from smidgen.data.kinds.base import TaskKind
from smidgen.data.processor import Processor
from smidgen.inference.builtin_models import _guarded, _locate


def processor_of(model: nn.Module, kind: TaskKind | None = None) -> Processor:
    """The processor, for a kind of task, of a model that knows where it came from. Raises ModelError if it does not."""
    name = getattr(getattr(bare(model), "config", None), "_name_or_path", "")
    if not name:
        raise ModelError("the model does not say where it came from; pass tokenizer=" if _reads_text(kind) else
                         "the model does not say where it came from; pass processor=")  # fmt: skip
    return load_processor(name, kind, bare(model))


BY_INPUT = {"pixel_values": "AutoImageProcessor", "input_values": "AutoFeatureExtractor",
            "input_features": "AutoFeatureExtractor"}  # fmt: skip


def load_processor(
    name: str | os.PathLike[str], kind: TaskKind | None = None, model: nn.Module | None = None
) -> Processor:
    """The processor of a model's name: of a kind of task, else of what the model takes, else its tokenizer.

    A tokenizer without a padding token pads with its end token. Raises ModelError if it cannot be loaded.
    """
    folder, options = _locate(os.fspath(name))
    told = BY_INPUT.get(getattr(model, "main_input_name", ""), TaskKind.processor_class)
    cls = getattr(transformers, told if kind is None else kind.processor_class)
    processor = _guarded(str(name), lambda: cls.from_pretrained(folder, **options))
    if hasattr(processor, "pad_token") and processor.pad_token is None:
        processor.pad_token = processor.eos_token
    return cast(Processor, processor)


def _reads_text(kind: TaskKind | None) -> bool:
    return kind is None or kind.processor_class == TaskKind.processor_class
