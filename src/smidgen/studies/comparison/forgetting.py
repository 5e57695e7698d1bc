"""Forgetting: how far a delta moves the base's features on texts that have nothing to do with its task."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from smidgen.common.module_modes import evaluating
from smidgen.data.processor import Processor
from smidgen.data.task import Task
from smidgen.delta.attaching import attached
from smidgen.delta.delta import Delta
from smidgen.inference.task_record import TaskRecord
from smidgen.training.run.prompt_budget import longest

TEXTS, LENGTH = 32, 64  # neutral texts, tokens of each


def feature_drift(model: nn.Module, delta: Delta, processor: Processor) -> float | None:
    """Mean over tokens of |h' - h| / |h|, the last hidden states with and without a delta; 0 where nothing moved.

    The texts are the first 32 of the built-in "bbc-news"' test split, 64 tokens of each, or as many as
    the delta was trained with. None for models that do not
    read such texts with hidden states to tell.
    """
    if not isinstance(processor, PreTrainedTokenizerBase):
        return None
    known = (TaskRecord.of(delta.info).max_length, longest(model, delta.recipe, processor), LENGTH)
    length = min(most for most in known if most is not None)
    texts = Task.load("bbc-news").split("test")["text"][:TEXTS]
    batch = processor(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
    inputs = {key: batch[key].to(next(model.parameters()).device) for key in ("input_ids", "attention_mask")}
    with evaluating(model), torch.inference_mode():
        before = _hidden(model, inputs)
        with attached(model, delta):
            after = _hidden(model, inputs)
    if before is None or after is None or before.shape != after.shape:
        return None
    kept = inputs["attention_mask"].bool()
    moved = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=torch.finfo(before.dtype).tiny)
    return float(moved[kept].mean())


def _hidden(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor | None:
    """Last hidden states (B, T, d) in float32."""
    options = {"decoder_input_ids": inputs["input_ids"]} if getattr(model.config, "is_encoder_decoder", False) else {}
    found = model(**inputs, **options, output_hidden_states=True)
    states = getattr(found, "hidden_states", None) or getattr(found, "decoder_hidden_states", None)
    return None if not states else states[-1].float()
