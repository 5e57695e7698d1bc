"""Inputs of the shapes that a model takes, to count with: what stands in them does not matter."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
_SAMPLES = 16_000  # a second of sound
_SECOND = 100  # frames of features in one


def placeholders(model: nn.Module, batch_size: int, length: int) -> Iterator[Inputs]:
    """Inputs to try, the likeliest first: token ids, then with a decoder's; images or sound, alone and beside ids.

    Args:
        batch_size, length: of token ids, (batch_size, length) each; images and sound have the size that the model's
            configuration names, or a usual one.
    """
    takes = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    ids = torch.zeros(batch_size, length, dtype=torch.long)
    decoder = {"decoder_input_ids": ids} if "decoder_input_ids" in takes else {}
    text = {"input_ids": ids} if "input_ids" in takes or config is None else {}
    senses = [{name: value} for name in takes for value in _sense(name, config, batch_size)]
    texts = [each for each in (text, text | decoder if text else {}) if each]
    beside = [sense | each for sense in senses for each in ({}, decoder, *texts)]
    seen = list[tuple[Any, ...]]()
    for inputs in (*texts, *beside):
        shape = tuple(sorted((name, tuple(value.shape)) for name, value in inputs.items()))
        if shape not in seen:
            seen.append(shape)
            yield inputs


def _sense(name: str, config: Any, batch: int) -> Iterator[Tensor]:
    if name == "pixel_values":
        height, width = _pair(_look(config, "image_size", "img_size", "input_size", default=224))
        channels = _look(config, "num_channels", "in_channels", "in_chans", default=3)
        yield torch.zeros(batch, channels, height, width)
    bins = _look(
        config, "num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim", default=80
    )
    if name == "input_values":
        yield torch.zeros(batch, _SAMPLES)
        yield torch.zeros(batch, _look(config, "max_length", default=_SECOND), bins)
    if name == "input_features":
        frames = 2 * _look(config, "max_source_positions", default=_SECOND // 2)
        yield torch.zeros(batch, bins, frames)
        yield torch.zeros(batch, _SECOND, bins)


def _look(config: Any, *names: str, default: Any) -> Any:
    """The first of some attributes that a configuration, or one within it, has."""
    inner = [getattr(config, name, None) for name in ("vision_config", "audio_config", "encoder_config")]
    for one in (config, *inner):
        for name in names:
            value = getattr(one, name, None)
            if value:
                return value
    return default


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        return int(value["height"]), int(value["width"])
    return (int(value[-2]), int(value[-1])) if isinstance(value, list | tuple) else (int(value), int(value))
