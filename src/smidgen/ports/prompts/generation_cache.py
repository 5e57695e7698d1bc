"""`generate` on a model with a prompt: a cache holds the prompt too, and `generate` knows of the text alone.

Two methods of the model are stood in for on the instance, as long as a prompt is attached: what leaves out the tokens
that a cache holds and makes masks as wide as the cache, and what makes a cache of fixed length.
"""

from __future__ import annotations

from functools import partial
from typing import TypedDict, Unpack

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from smidgen.ports.prompts.input_edits import current_prompt, input_edits_of
from smidgen.ports.prompts.token_insertion import TokenInsertion

STAND_INS = ("prepare_inputs_for_generation", "_prepare_static_cache")


class StepInputs(TypedDict, total=False):
    """What `generate` knows at one step, as far as it is read here."""

    past_key_values: object
    attention_mask: object
    next_sequence_length: int | None
    inputs_embeds: Tensor | None


def place_generation(model: nn.Module, embedding: str) -> None:
    """Stand in for a decoder's methods of `generate`; `embedding` is the path of the module with the prompt."""
    assert isinstance(model, PreTrainedModel)  # else no site is an input
    if not model.config.is_encoder_decoder and hasattr(model, STAND_INS[0]):
        model.__dict__[STAND_INS[0]] = partial(prepare_inputs, model, embedding)
        model.__dict__[STAND_INS[1]] = partial(prepare_static_cache, model, embedding)


def drop_generation(model: nn.Module) -> None:
    """The class's own methods again."""
    for name in STAND_INS:
        model.__dict__.pop(name, None)


def prepare_inputs(
    model: nn.Module, embedding: str, input_ids: Tensor, **kwargs: Unpack[StepInputs]
) -> dict[str, object]:
    """The class's own inputs of one step. Fed are the tokens that the cache lacks, the prompt not counted."""
    own = partial(getattr(type(model), STAND_INS[0]), model)
    n, at = _prompt(model, embedding)
    past, mask, count = kwargs.get("past_key_values"), kwargs.get("attention_mask"), kwargs.get("next_sequence_length")
    if not n or past is None:
        return own(input_ids, **kwargs)
    seen = seen_by(past)
    vectors = kwargs.get("inputs_embeds")
    text = input_ids.shape[1] if vectors is None else max(input_ids.shape[1], vectors.shape[1])
    if seen and count is not None and count == text - seen:  # of a cache from an earlier turn
        kwargs["next_sequence_length"] = int(count) + n
    if not (getattr(past, "is_compileable", False) and isinstance(mask, Tensor) and mask.ndim == 2):
        return own(input_ids, **kwargs)
    inserted = TokenInsertion.of(mask, n, at, mask.device)
    if seen:
        kwargs["attention_mask"] = inserted.insert(mask, mask.new_ones(()))
    inputs: dict[str, object] = own(input_ids, **kwargs)
    made = inputs["attention_mask"]
    if isinstance(made, Tensor) and made.ndim == 2:  # BLOOM's, as wide as the cache: there is room in the model's hook
        inputs["attention_mask"] = inserted.remove(made) if seen else made[:, :-n]
    elif not seen:  # the model makes its masks itself, once there is room for the prompt
        inputs["attention_mask"] = mask
    return inputs


def prepare_static_cache(model: nn.Module, embedding: str, *, max_cache_len: int, **kwargs: object) -> Cache:
    """The class's own cache, with places for the prompt."""
    n, _ = _prompt(model, embedding)
    own = getattr(type(model), STAND_INS[1])
    return own(model, max_cache_len=max_cache_len + n, **kwargs)


def _prompt(model: nn.Module, embedding: str) -> tuple[int, int]:
    """Vectors that are on, and tokens before them."""
    module = model.get_submodule(embedding)
    prompt = current_prompt(module)
    return (0 if prompt is None else prompt.shape[1]), input_edits_of(module).at


def seen_by(cache: object) -> int | Tensor:
    """How many tokens a cache holds, a prompt included; 1 for some where it does not count them."""
    if not isinstance(cache, Cache):
        return 1
    if any(isinstance(layer, CacheLayerMixin) for layer in cache.layers) or not cache.layers:
        return cache.get_seq_length()
    return int(cache.has_previous_state())
