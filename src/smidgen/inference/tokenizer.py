"""The tokenizer that belongs to a model or a name."""

from __future__ import annotations

import os

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from smidgen.common.errors import ModelError
from smidgen.common.wrappers import bare
from smidgen.inference.builtin_models import _guarded, _locate


def tokenizer_of(model: nn.Module) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that knows where it came from. Raises ModelError if it does not."""
    name = getattr(getattr(bare(model), "config", None), "_name_or_path", "")
    if not name:
        raise ModelError("the model does not say where it came from; pass tokenizer=")
    return load_tokenizer(name)


def load_tokenizer(name: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's name; one without a padding token pads with its end token."""
    folder, options = _locate(os.fspath(name))
    tokenizer = _guarded(str(name), lambda: AutoTokenizer.from_pretrained(folder, **options))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
