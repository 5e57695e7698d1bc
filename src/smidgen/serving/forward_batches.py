"""One batch of requests through the model."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from smidgen.data.kinds.base import Outputs
from smidgen.ports.forward_state import mixed
from smidgen.ports.pooling import pool
from smidgen.serving.requests import Request, Result


def compute(requests: Sequence[Request]) -> list[Result]:
    """The result of each request, of one group, in their order."""
    order = sorted(range(len(requests)), key=lambda i: "" if (t := requests[i].tenant) is None else t.order)
    rows = [requests[i] for i in order]
    model, kind = rows[0].model, rows[0].kind
    with model.lock, torch.inference_mode():
        batch = {k: v.to(model.device) for k, v in model.collator(kind)([row.example for row in rows]).items()}
        inputs, labels = kind.parted(batch)
        mix, begin = model.mix([row.tenant for row in rows]), time.perf_counter()
        with mixed(mix):
            if rows[0].wanted == "vector":
                found = _vectors(model.model, inputs)
            else:
                outputs: Outputs = kind.forward(model.model, inputs)
                found = outputs.logits
        found = found.float().cpu()
        model.forward_seconds += time.perf_counter() - begin
        labels = None if labels is None else labels.cpu()
    results: list[Result | None] = [None] * len(rows)
    for place, (row, i) in enumerate(zip(rows, order, strict=True)):
        each = found[place] if row.width is None else found[place][..., : row.width]
        results[i] = each.clone(), None if labels is None else labels[place]
    return [result for result in results if result is not None]


def _vectors(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The mean of the last hidden states over a text's tokens, of length 1: (B, d)."""
    base = getattr(model, "base_model", model)
    hidden = base(**inputs).last_hidden_state
    return torch.nn.functional.normalize(pool(hidden, inputs.get("attention_mask"), "mean"), dim=-1)
