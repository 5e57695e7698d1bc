"""Inputs that a model can be run on, or counted with, made from its configuration: random ids, images, sounds."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from smidgen.common.errors import ModelError

ROWS, LENGTH = 2, 8  # examples, tokens
SAMPLES, FRAMES = 16_000, 100  # a second of sound, and of its features
Inputs = dict[str, Tensor]


def fitting_inputs(model: nn.Module, given: Mapping[str, Tensor] | None = None) -> Inputs:
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


def input_candidates(
    model: nn.Module, rows: int = ROWS, length: int = LENGTH, samples: int = SAMPLES
) -> Iterator[Inputs]:
    """Inputs to try, likely ones first: text, then with a decoder's; images or sound, alone and beside text.

    Args:
        rows, length: of token ids, (rows, length) each.
        samples: of a sound (rows, samples), a second if the model takes none so short; its features, and images, have
            the size that the model's configuration names, or a usual one.
    """
    config = getattr(model, "config", None)
    names = list(inspect.signature(model.forward).parameters)
    if not isinstance(config, PretrainedConfig):
        yield from [{"input_ids": torch.zeros(rows, length, dtype=torch.long)}] if "input_ids" in names else []
        return
    text = _text(config, names, rows, length) if "input_ids" in names else {}
    decoder = {"decoder_input_ids": _ids(config, rows, length)} if "decoder_input_ids" in names else {}
    texts = [text, *([text | decoder] if decoder else [])] if text else []
    yield from texts
    beside = [{}, *([decoder] if decoder else []), *texts]
    for thing in (*_images(config, names, rows), *_sounds(config, names, rows, samples)):
        yield from (thing | each for each in beside)


def look(config: PretrainedConfig, *names: str, default: object = None) -> Any:
    """The first of several settings that a configuration, or one inside it, has."""
    inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    found = (look(part, *names) for part in inner)
    return next((value for value in found if value is not None), default)


def _text(config: PretrainedConfig, names: list[str], rows: int, length: int) -> Inputs:
    found = {"input_ids": _ids(config, rows, length)}
    if "attention_mask" in names:
        found["attention_mask"] = torch.ones(rows, length, dtype=torch.long)
    if "bbox" in names:
        found["bbox"] = torch.tensor([1, 2, 5, 7]).expand(rows, length, 4).contiguous()
    return found


def _ids(config: PretrainedConfig, rows: int, length: int) -> Tensor:
    """Ids (rows, length) that mean nothing special, as far as the configuration says."""
    size = int(look(config.get_text_config(), "vocab_size", default=look(config, "vocab_size", default=32)))
    special = {v for part in (config, config.get_text_config()) for k, v in vars(part).items()
               if k.endswith(("_id", "_index")) and isinstance(v, int)}  # fmt: skip
    plain = torch.tensor([i for i in range(min(size, 2000)) if i not in special] or [0])
    return plain[torch.randint(len(plain), (rows, length), generator=torch.Generator().manual_seed(6))]


def _images(config: PretrainedConfig, names: list[str], rows: int) -> Iterator[Inputs]:
    if "pixel_values" not in names:
        return
    high, wide = _sides(look(config, "image_size", "img_size", "input_size", default=224))
    channels = look(config, "num_channels", "in_channels", "in_chans", default=3)
    yield {"pixel_values": _noise(rows, channels, high, wide)}
    yield {"pixel_values": _noise(rows, 1, channels, high, wide)}
    frames = look(config, "num_frames", default=2)
    yield {"pixel_values": _noise(rows, frames, channels, high, wide)}


def _sides(size: dict[str, int] | Sequence[int] | int) -> tuple[int, int]:
    """Height and width, as configurations write them."""
    if isinstance(size, dict):
        return int(size["height"]), int(size["width"])
    return (int(size[-2]), int(size[-1])) if isinstance(size, Sequence) else (int(size), int(size))


def _sounds(config: PretrainedConfig, names: list[str], rows: int, samples: int) -> Iterator[Inputs]:
    settings = ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim")
    bins = look(config, *settings, default=80)
    if "input_values" in names:
        yield from ({"input_values": _noise(rows, count)} for count in dict.fromkeys((samples, SAMPLES)))
        yield {"input_values": _noise(rows, look(config, "max_length", default=FRAMES), bins)}
    if "input_features" in names:
        yield {"input_features": _noise(rows, bins, 2 * look(config, "max_source_positions", default=FRAMES // 2))}
        yield {"input_features": _noise(rows, FRAMES, bins)}


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))
