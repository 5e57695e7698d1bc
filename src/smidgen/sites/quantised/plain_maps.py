"""A model's quantised maps as plain ones with the weights that they multiply with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from smidgen.sites.quantised.maps import quantised_maps

MARKS = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


def dequantise(model: nn.Module, dtype: torch.dtype) -> None:
    """Put an nn.Linear of this dtype in the place of each quantised map; nothing of transformers' says otherwise."""
    for path, module, storage in list(quantised_maps(model)):
        weight, bias = storage.dequantised(module).detach(), module._parameters.get("bias")
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.to(dtype))
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)
        plain.train(module.training)
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, plain)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            for mark in MARKS:
                if mark in vars(part):
                    delattr(part, mark)
            for config in (part.config, part.config.get_text_config()):
                _forget(config)


def _forget(config: Any) -> None:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
