"""The input port: trained vectors among the embedded tokens of a text.

A pre-hook of the model that takes token ids makes room in ids, mask, token types and positions; a hook of the embedding
fills it; a hook of the model takes it out of the hidden states again, so that heads, labels and poolings see the text
alone. In an encoder-decoder the decoder goes on seeing it. Once a cache holds the prompt, only mask and positions are
adjusted.

The prompt stands beside the text, behind padding on the left. Where the model reads its first token ([CLS]), it stands
behind that one, else in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel

from smidgen.common.errors import AttachError
from smidgen.common.hook_types import Args, Kwargs, Output
from smidgen.methods.base import Method
from smidgen.planning.entry import Entry
from smidgen.planning.prompt_positions import prompt_length
from smidgen.planning.rules.inputs import InputRules
from smidgen.ports.base import Port
from smidgen.ports.edit import Edit, EditedModule, drop_edits, edits_of, give_edits, put_edit
from smidgen.ports.forward_state import Prompted, state
from smidgen.ports.prompts.generation_cache import drop_generation, place_generation, seen_by
from smidgen.ports.prompts.input_edits import InputEdit, InputEdits, InputLayouts, current_prompt, input_edits_of
from smidgen.ports.prompts.token_insertion import TokenInsertion
from smidgen.sites.input_embedding import _limit, position_limit
from smidgen.sites.site import InputSite, Site
from smidgen.sites.task_head import own_pooling

# What a model may get for each token beside ids, mask and positions; a prompt gets what the token beside it has.
PER_TOKEN = (
    "token_type_ids",
    "bbox",
    "global_attention_mask",
    "xpath_tags_seq",
    "xpath_subs_seq",
    "cross_attention_mask",
)


TEXT = ("mm_token_type_ids", "moe_mm_token_type_ids", "image_embeds_position_mask")  # 0 is text


NO_ROOM = ("perm_mask", "target_mapping", "input_mask", "mems", "past_buckets_states")


STATES = ("last_hidden_state", "logits")  # of an output, one for each token


HELD = "_smidgen_prompt"  # attribute of a cache: length of the prompt that it holds


UNLABELLED = -100  # what transformers' losses leave out


CACHES = ("past_key_values", "cache_params", "state")


class PromptPort(InputRules, Port):
    """The embedding of a text's tokens, and the model around it that takes their ids."""

    edit = InputEdit

    def check(self, model: nn.Module, entry: Entry) -> None:
        """Raises AttachError if the embedding cannot take the method's vectors."""
        assert isinstance(entry.site, InputSite)
        check_tokens(model, entry.site, entry.method)

    def place(self, model: nn.Module, site: Site, key: str, edit: Edit) -> list[RemovableHandle]:
        """At the embedding; hooks of the model around it make room and take the prompt out again."""
        assert isinstance(site, InputSite)
        module = model.get_submodule(site.path)
        handles = [] if edits_of(module, InputEdits) is not None else _take_over(model, site, InputEdits)
        put_edit(module, key, edit)
        place_generation(model, site.path)
        return handles

    def remove(self, model: nn.Module, site: Site) -> None:
        """Take the vectors and the stand-ins for `generate` away."""
        drop_edits(model.get_submodule(site.path))
        drop_generation(model)

    def why_no_rows(self, edit: Edit) -> str | None:
        """Each row has vectors of its own."""
        return None

    def place_layout(self, model: nn.Module, site: Site, layout: str, key: str, edit: Edit) -> list[RemovableHandle]:
        """At the embedding. All rows of a batch have as many vectors."""
        assert isinstance(site, InputSite)
        module = model.get_submodule(site.path)
        if edits_of(module, InputLayouts) is None:
            handles = _take_over(model, site, InputLayouts)
            module.__dict__["_edit_handles"] += handles
        edits = edits_of(module, InputLayouts)
        assert edits is not None
        edits.add(layout, key, edit)
        return []

    def remove_layout(self, model: nn.Module, site: Site, layout: str) -> None:
        """Take a layout's vectors away; with the last ones also the hooks."""
        module = model.get_submodule(site.path)
        edits = edits_of(module, InputLayouts)
        if edits is not None:
            edits.drop(layout)
            if not len(edits):
                drop_edits(module)


def _take_over(model: nn.Module, site: InputSite, cls: type[InputEdits]) -> list[RemovableHandle]:
    """Give an embedding an empty place for edits; gives the hooks of the models around it."""
    module, entry = model.get_submodule(site.path), model.get_submodule(site.entry)
    assert isinstance(model, PreTrainedModel)  # else there is no such site
    assert isinstance(entry, PreTrainedModel)
    assert isinstance(module, nn.Embedding)
    decoder, names = _decoder(model, entry), tuple(signature(entry.forward).parameters)
    place, blank, limit = _place(model, entry), _blank(module, model), _limit(entry, module)
    give_edits(module, cls(names, place, blank, limit, decoder is None), module.register_forward_hook(fill_prompts))
    handles = [entry.register_forward_pre_hook(insert_prompt, with_kwargs=True, prepend=True)]
    if decoder is not None:
        return [*handles, decoder.register_forward_pre_hook(widen_cross, with_kwargs=True)]
    # before the pooling of rows, which may stand there already
    return [*handles, entry.register_forward_hook(remove_prompt, with_kwargs=True, prepend=cls is not InputEdits)]


def _place(model: PreTrainedModel, entry: PreTrainedModel) -> int:
    """Number of the text's tokens before the prompt."""
    pools = own_pooling(model) == "first" or getattr(entry, "pooler", None) is not None
    return 1 if pools and not model.config.is_encoder_decoder else 0


def _decoder(model: PreTrainedModel, entry: nn.Module) -> nn.Module | None:
    """The decoder behind an encoder; none for an encoder alone, whatever its configuration says (UMT5's taggers)."""
    if not model.config.is_encoder_decoder:
        return None
    decoder: nn.Module = model.get_decoder()
    return None if any(module is entry for module in decoder.modules()) else decoder


def _blank(embedding: nn.Embedding, model: PreTrainedModel) -> int:
    """An id for the room that no model takes for padding, or for the place of an image."""
    special = {embedding.padding_idx}
    for name, value in {**model.config.to_dict(), **model.config.get_text_config().to_dict()}.items():
        if name.endswith(("_token_id", "_token_index")):
            special |= set(value if isinstance(value, list) else [value])
    free = [i for i in range(min(embedding.num_embeddings, len(special) + 1)) if i not in special]
    return free[0] if free else next(i for i in range(3) if i not in {embedding.padding_idx, model.config.pad_token_id})


def insert_prompt(entry: PreTrainedModel, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
    """Forward pre-hook of the model that takes token ids."""
    module = entry.get_input_embeddings()
    edits, prompt = input_edits_of(module), current_prompt(module)
    state().prompts.pop(edits, None)
    given: Kwargs = {**dict(zip(edits.names, args, strict=False)), **kwargs}
    cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
    if prompt is None:
        if getattr(cache, HELD, 0) and seen_by(cache):
            raise AttachError("the cache holds a prompt, which is off now; begin with an empty cache")
        return None
    if cache is not None and (seen := seen_by(cache)):
        _check_cache(given, prompt.shape[1], seen, getattr(cache, HELD, 0))
        return (), _went_on(given, prompt.shape[1], edits.at)
    if wrong := [name for name in NO_ROOM if given.get(name) is not None]:
        raise AttachError(f"a prompt has no room in {wrong[0]}; leave it out, and give an attention_mask if need be")
    _put_in(edits, prompt, given)
    return (), given


def _fed(given: Mapping[str, object]) -> Tensor:
    ids = given.get("input_ids")
    fed = given["inputs_embeds"] if ids is None else ids
    assert isinstance(fed, Tensor)
    return fed


def _went_on(given: Kwargs, n: int, at: int) -> Kwargs:
    """Arguments behind a cache that holds the prompt. Masks of each query are as wide as the cache already."""
    mask, places = given.get("attention_mask"), given.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        given["attention_mask"] = TokenInsertion.of(mask, n, at, mask.device).insert(mask, mask.new_ones(()))
    if places is not None:
        given["position_ids"] = places + n
    return given


def _check_cache(given: Mapping[str, object], n: int, seen: int | Tensor, held: int) -> None:
    """Raises AttachError if a cache does not hold the prompt, or cache and tokens are not the whole text."""
    if held != n:
        raise AttachError(
            f"the cache was filled with {f'a prompt of {held}' if held else 'no prompt'}, and one of {n} is on now; "
            "begin with an empty cache"
        )
    mask, fed = given.get("attention_mask"), _fed(given).shape[1]
    if isinstance(seen, Tensor) or not isinstance(mask, Tensor) or mask.ndim != 2 or seen + fed == mask.shape[1] + n:
        return
    raise AttachError(
        f"the mask has {mask.shape[1]} tokens, but {seen - n} are in the cache (with a prompt of {n}, which it counts) "
        f"and {fed} given; give the tokens from {seen - n} on"
    )


def _put_in(edits: InputEdits, prompt: Tensor, given: Kwargs) -> None:
    """Insert places into whatever has a place for each token."""
    n, fed, mask = prompt.shape[1], _fed(given), given.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        found = f"one of {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise AttachError(f"a prompt needs an attention mask (batch, tokens), found {found}")
    check_positions_left(edits.limit, n, fed.shape[1])
    inserted = TokenInsertion.of(mask, n, edits.at, fed.device)
    known = state().prompts[edits] = Prompted(inserted, fed.shape[1], mask)
    if given.get("inputs_embeds") is None:
        given["input_ids"] = inserted.insert(fed, fed.new_full((), edits.blank))
        known.pending = prompt, given["input_ids"]
    else:
        given["inputs_embeds"] = inserted.fill(inserted.insert(fed, fed.new_zeros(())), prompt)
    if mask is not None:
        given["attention_mask"] = inserted.insert(mask, mask.new_ones(()))
    for name in (*PER_TOKEN, *TEXT):
        if (each := given.get(name)) is not None:
            text = name in TEXT or "pixel_values" in edits.names  # types say which tokens are an image's
            given[name] = inserted.insert(each, each.new_zeros(())) if text else inserted.repeat(each)
    if given.get("position_ids") is not None:
        given["position_ids"] = inserted.positions(given["position_ids"])
    labels = given.get("labels")
    if labels is not None and labels.shape == fed.shape[:2]:  # a model that computes its loss itself
        given["labels"] = inserted.insert(_shiftable(labels), labels.new_full((), UNLABELLED))


def _shiftable(labels: Tensor) -> Tensor:
    """Labels (B, T) of which no prompt predicts the first: nothing stands before it without one."""
    return torch.cat([torch.full_like(labels[:, :1], UNLABELLED), labels[:, 1:]], 1)


def check_positions_left(limit: int | None, n: int, tokens: int) -> None:
    """Raises AttachError if prompt and text are longer than the model's table of positions."""
    if limit is not None and n + tokens > limit:
        shorter = f"max_length={limit - n} or a shorter prompt fits" if limit - n > 2 else "a shorter prompt fits"
        raise AttachError(
            f"a prompt of {n} and a text of {tokens} tokens need {n + tokens} positions, the model has {limit}; "
            f"{shorter}"
        )


def check_tokens(model: nn.Module, site: InputSite, method: Method) -> None:
    """Raises AttachError, before anything is touched, if an embedding cannot take a method's vectors."""
    module = model.get_submodule(site.path)
    check_positions_left(position_limit(model, site), prompt_length(method, site), 1)
    config: object = getattr(model, "config", None)
    if getattr(config, "audio_length_per_tok", None):
        raise AttachError(
            f"each token of {type(model).__name__} has its own piece of sound, and a prompt has none; Prefix(), LN() "
            "and LoRA() act on it"
        )
    if hasattr(module, "edits"):
        raise AttachError(f"{type(module).__name__} at {site.path} already has an attribute 'edits'")


def fill_prompts(module: EditedModule[InputEdits], args: Args, output: Tensor) -> Tensor | None:
    """Forward hook of the embedding: the prompt stands where room was made."""
    edits = module.edits
    known = state().prompts.get(edits)
    if known is None or known.pending is None:
        return None
    (prompt, wide), ids, inserted = known.pending, args[0], known.inserted
    known.pending = None
    if not edits.taken_out:
        del state().prompts[edits]
    if wide.shape == ids.shape[::-1]:  # XLNet embeds (T, B)
        turned = inserted.fill(output.transpose(0, 1), prompt).transpose(0, 1)
        if wide.shape != ids.shape:
            return turned
        return torch.where((ids == wide).all(), inserted.fill(output, prompt), turned)
    return inserted.fill(output, prompt)


def remove_prompt(entry: PreTrainedModel, args: Args, kwargs: Kwargs, output: Output) -> object:
    """Forward hook of the model that takes token ids: of its hidden states (B, n + T, d), those of the text."""
    known = state().prompts.pop(input_edits_of(entry.get_input_embeddings()), None)
    if known is None:
        return None
    inserted = known.inserted
    for name in CACHES:
        if isinstance(cache := getattr(output, name, None), Cache):
            cache.__dict__[HELD] = inserted.n
    if "attention_mask" in kwargs:  # hooks behind this one pool the text's tokens by it
        kwargs["attention_mask"] = known.mask
    if isinstance(output, tuple):
        return (inserted.remove(output[0]), *output[1:])
    for name in STATES:
        if output.get(name) is not None:
            output[name] = _text_of(entry, inserted, output[name], known.tokens, kwargs.get("logits_to_keep", 0))
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(map(inserted.remove, output["hidden_states"]))
    return output


def _text_of(entry: nn.Module, inserted: TokenInsertion, states: Tensor, tokens: int, last: int | Tensor) -> Tensor:
    """States or logits of the text alone: of all its tokens, or of so many at the end, where no prompt stands.

    Raises:
        AttachError: there are fewer than tokens.
    """
    if isinstance(last, int) and 0 < last <= tokens and states.shape[1] == last:
        return states
    if states.shape[1] < tokens + inserted.n:  # more where an image's follow
        raise AttachError(
            f"{type(entry).__name__} gives {states.shape[1]} states for {tokens + inserted.n} tokens: it shortens the "
            "text, and a prompt cannot be taken out of what is left"
        )
    return inserted.remove(states)


def widen_cross(decoder: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
    """Forward pre-hook of a decoder: it sees the prompt among the encoder's states, whose mask is the text's."""
    states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
    if states is None or mask is None or states.shape[1] == mask.shape[1]:
        return None
    inserted = TokenInsertion.of(mask, states.shape[1] - mask.shape[1], 0, mask.device)
    return args, {**kwargs, "encoder_attention_mask": inserted.insert(mask, mask.new_ones(()))}
