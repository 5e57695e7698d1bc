"""Inputs that a model can be run on, made from its configuration: random ids, images, sounds."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from smidgen.common.errors import ModelError

ROWS, LENGTH, SAMPLES = 2, 8, 2000  # examples, tokens, samples of sound
Inputs = dict[str, Tensor]


def fitting_inputs(model: nn.Module, given: Mapping[str, Any] | None = None) -> Inputs:
    """Inputs that the model takes: `given`, or the first of those made here that it runs on.

    Raises:
        ModelError: nothing made here will do; with what the model said to the first.
    """
    first = ""
    for inputs in [dict(given)] if given is not None else input_candidates(model):
        dtype = next(model.parameters()).dtype
        inputs = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
        try:
            with torch.no_grad():
                model(**inputs)
            return inputs
        except Exception as error:  # whatever a forward says to inputs that are not for it
            first = first or f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    raise ModelError(
        f"no input could be made that {type(model).__name__} runs on ({first or 'it says nothing of its inputs'}); "
        "in Python, give a batch: smidgen.doctor(model, recipe, inputs=batch)"
    )


def input_candidates(model: nn.Module) -> Iterator[Inputs]:
    """Inputs to try, likely ones first: text alone, then what else the model sees or hears."""
    config: Any = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return
    names = list(inspect.signature(model.forward).parameters)
    text = _text(config, names) if "input_ids" in names else {}
    beside: Inputs = {"decoder_input_ids": _ids(config)} if "decoder_input_ids" in names else {}
    other = [*_images(config, names), *_sounds(config, names)]
    if text:
        yield text | beside
    for thing in other:
        yield thing | beside
    for thing in other if text else ():
        yield text | thing | beside


def look(config: PretrainedConfig, *names: str, default: Any = None) -> Any:
    """The first of several settings that a configuration, or one inside it, has."""
    inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    found = (look(part, *names) for part in inner)
    return next((value for value in found if value is not None), default)


def _text(config: PretrainedConfig, names: list[str]) -> Inputs:
    found = {"input_ids": _ids(config)}
    if "attention_mask" in names:
        found["attention_mask"] = torch.ones(ROWS, LENGTH, dtype=torch.long)
    if "bbox" in names:
        found["bbox"] = torch.tensor([1, 2, 5, 7]).expand(ROWS, LENGTH, 4).contiguous()
    return found


def _ids(config: PretrainedConfig) -> Tensor:
    """Ids (ROWS, LENGTH) that mean nothing special, as far as the configuration says."""
    size = int(look(config.get_text_config(), "vocab_size", default=look(config, "vocab_size", default=32)))
    special = {v for part in (config, config.get_text_config()) for k, v in vars(part).items()
               if k.endswith(("_id", "_index")) and isinstance(v, int)}  # fmt: skip
    plain = torch.tensor([i for i in range(min(size, 2000)) if i not in special] or [0])
    return plain[torch.randint(len(plain), (ROWS, LENGTH), generator=torch.Generator().manual_seed(6))]


def _images(config: PretrainedConfig, names: list[str]) -> Iterator[Inputs]:
    if "pixel_values" not in names:
        return
    size = look(config, "image_size", "img_size", "input_size", default=224)
    high, wide = size[-2:] if isinstance(size, list | tuple) else (size, size)
    channels = look(config, "num_channels", "in_channels", "in_chans", default=3)
    yield {"pixel_values": _noise(ROWS, channels, high, wide)}
    yield {"pixel_values": _noise(ROWS, 1, channels, high, wide)}
    frames = look(config, "num_frames", default=2)
    yield {"pixel_values": _noise(ROWS, frames, channels, high, wide)}


def _sounds(config: PretrainedConfig, names: list[str]) -> Iterator[Inputs]:
    bins = look(config, "num_mel_bins", "feature_size", default=80)
    if "input_values" in names:
        yield {"input_values": _noise(ROWS, SAMPLES)}
        yield {"input_values": _noise(ROWS, look(config, "max_length", default=64), bins)}
    if "input_features" in names:
        yield {"input_features": _noise(ROWS, bins, 2 * look(config, "max_source_positions", default=32))}
        yield {"input_features": _noise(ROWS, 64, bins)}


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))
