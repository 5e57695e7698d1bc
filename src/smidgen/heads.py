"""The head: what the checkpoint lacked and what the class declares for its task. Outside the recipe, always trained.

Pooling is a field of the head. Where it differs from the class's own reading, one hook on the base model puts the
pooled vector at every position, so that whichever token the class reads, it reads the pooled one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from smidgen.errors import AttachError

POOLINGS = ("first", "mean", "last")
FIRST = frozenset(
    [
        "bert",
        "roberta",
        "xlm-roberta",
        "camembert",
        "electra",
        "mpnet",
        "distilbert",
        "albert",
        "deberta",
        "deberta-v2",
        "modernbert",
        "vit",
        "deit",
    ]
)


def note_new(model: nn.Module, missing: set[str]) -> None:
    """Remember which parameters the checkpoint lacked (names), so that they count as head."""
    model._smidgen_new = tuple(n for n, _ in model.named_parameters() if n in missing)  # type: ignore[assignment]


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the head's parameters, in the model's order; empty for a causal LM or a plain encoder.

    A model loaded by `smidgen.load` knows what its checkpoint lacked. For others, everything outside the base
    model counts.
    """
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return ()
    if model.get_output_embeddings() is not None:
        return ()
    outside = _outside(model)
    new: Any = getattr(model, "_smidgen_new", None)
    if new is None:
        return outside
    labels = getattr(model.config, "num_labels", 0)
    parameters = dict(model.named_parameters())
    last = {name for name in outside if parameters[name].shape[0] == labels}
    return tuple(name for name in parameters if name in last or name in new)


def _outside(model: PreTrainedModel) -> tuple[str, ...]:
    prefix = model.base_model_prefix + "."
    return tuple(n for n, _ in model.named_parameters() if not n.startswith(prefix) and ".edits." not in f".{n}")


def own_pooling(model: nn.Module) -> str | None:
    """Which token the class itself reads, where that is known: "first" or "last"."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    if config.model_type in FIRST and getattr(config, "classifier_pooling", "cls") == "cls":
        return "first"
    return "last" if isinstance(getattr(model, "score", None), nn.Linear) else None


def check_pooling(model: nn.Module, pooling: str | None) -> str | None:
    """`pooling`, or None where it is what the class does anyway.

    Raises:
        AttachError: no such pooling, or a model without a head that reads one vector.
    """
    if pooling is None:
        return None
    if pooling not in POOLINGS:
        raise AttachError(f"pooling={pooling!r} is not one of {', '.join(POOLINGS)}")
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise AttachError(f"pooling needs a model for sequence classification, not {type(model).__name__}")
    return None if pooling == own_pooling(model) else pooling


def unused_under(model: nn.Module, pooling: str | None) -> tuple[str, ...]:
    """Names of parameters that a pooling leaves without effect: the base model's own pooler."""
    if pooling is None or not isinstance(model, PreTrainedModel):
        return ()
    prefix = f"{model.base_model_prefix}.pooler."
    return tuple(name for name, _ in model.named_parameters() if name.startswith(prefix))


def new_pooler(model: nn.Module) -> tuple[str, ...]:
    """Names of the base model's own pooler if the checkpoint lacked it: it is head, or without effect."""
    new: Any = getattr(model, "_smidgen_new", None) or ()
    return tuple(name for name in unused_under(model, POOLINGS[0]) if name in new)


def place_pooling(model: nn.Module, pooling: str) -> RemovableHandle:
    """Hook the base model so that its output carries the pooled vector at every position."""
    base: Any = model.base_model
    return base.register_forward_hook(partial(pool_output, pooling), with_kwargs=True)


def pool_output(pooling: str, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook: last_hidden_state (B, T, d) -> its pooled vector (B, d), repeated over T."""
    hidden = output[0]
    pooled = pool(hidden, kwargs.get("attention_mask"), pooling)
    spread = pooled[:, None, :].expand_as(hidden)
    if isinstance(output, tuple):
        return (spread, pooled, *output[2:]) if len(output) > 1 and output[1].ndim == 2 else (spread, *output[1:])
    output["last_hidden_state"] = spread
    if output.get("pooler_output") is not None:
        output["pooler_output"] = pooled
    return output


def pool(hidden: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Pool hidden states (B, T, d) over the tokens that mask (B, T) keeps: "first", "mean" or "last" -> (B, d)."""
    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    if pooling == "mean":
        weight = mask.to(hidden.dtype)[..., None]  # (B, T, 1)
        return (hidden * weight).sum(1) / weight.sum(1)
    place = torch.arange(mask.shape[1], device=mask.device)
    kept = mask.bool()
    if pooling == "last":
        index = torch.where(kept, place, -1).amax(1)
    else:
        index = torch.where(kept, place, mask.shape[1]).amin(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), index]
