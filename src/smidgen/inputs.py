"""The input port: trained vectors among the embedded tokens of a text.

A pre-hook of the model that takes token ids makes room in ids, mask, token types and positions; a hook of the embedding
fills it; a hook of the model takes it out of the hidden states again, so that heads, labels and poolings see the text
alone. In an encoder-decoder the decoder goes on seeing it. Once a cache holds the prompt, only mask and positions are
adjusted.

Where the model reads its first token ([CLS]), the prompt stands behind it, else in front.
"""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from smidgen.errors import AttachError
from smidgen.heads import own_pooling
from smidgen.method import Method
from smidgen.ports import Edit, Edits
from smidgen.sites import Site, find_blocks


class InputEdits(Edits):
    """The edits at one embedding: what comes from them in the pass that is under way."""

    def __init__(self, names: tuple[str, ...], at: int, blank: int, limit: int | None) -> None:
        super().__init__()
        self.names, self.at, self.blank, self.limit = names, at, blank, limit
        self.pending: Tensor | None = None
        self.mask: Tensor | None = None
        self.count = 0

    def prompt(self, dtype: torch.dtype) -> Tensor | None:
        """The vectors of all edits that are on, (n, width)."""
        edits: list[Any] = list(self.values())
        found = [edit.tokens(dtype) for edit in edits if edit.enabled]
        return torch.cat(found) if found else None


def find_input(model: nn.Module) -> list[Site]:
    """The embedding of a text's tokens, and as `entry` the model around it that takes their ids; none for others."""
    entry: Any = _entry(model)
    try:
        embedding = None if entry is None else entry.get_input_embeddings()
    except NotImplementedError:  # Dia's encoder does not say where its embedding is
        return []
    if not isinstance(embedding, nn.Embedding):
        return []
    paths = {id(module): path for path, module in model.named_modules()}
    place = (paths[id(embedding)], "input", frozenset({"embedding"}), ())
    rows, width = embedding.num_embeddings, embedding.embedding_dim
    return [Site(*place, width_in=rows, width_out=width, entry=paths[id(entry)])]


def _entry(model: nn.Module) -> nn.Module | None:
    """The innermost model around the blocks that takes ids: OPT's and others' heads pass the outer ones by."""
    if not isinstance(model, PreTrainedModel):
        return None
    stacks = find_blocks(model)
    coder: Any = model.get_encoder() if model.config.is_encoder_decoder else model
    blocks = [set(map(id, found)) for found in stacks.values()]
    if len(stacks) != 1 and coder is model:
        return None
    found = [
        module
        for module in coder.modules()
        if isinstance(module, PreTrainedModel)
        and "input_ids" in signature(module.forward).parameters
        and any(inner <= set(map(id, module.modules())) for inner in blocks)
    ]
    return found[-1] if found else None


def add_tokens(model: Any, key: str, edit: Edit) -> list[RemovableHandle]:
    """Put an edit on the embedding, behind those that are there; gives the hooks that were placed elsewhere."""
    entry: Any = model.get_submodule(edit.site.entry)
    module: Any = model.get_submodule(edit.site.path)
    handles: list[RemovableHandle] = []
    if not isinstance(getattr(module, "edits", None), InputEdits):
        names = tuple(signature(entry.forward).parameters)
        module.add_module(
            "edits", InputEdits(names, _place(model, entry), _blank(module, model), _limit(entry, module))
        )
        module._edit_handles = [module.register_forward_hook(fill)]
        handles.append(entry.register_forward_pre_hook(make_room, with_kwargs=True))
        if model.config.is_encoder_decoder:
            decoder = model.get_decoder()
            handles.append(decoder.register_forward_pre_hook(widen_cross, with_kwargs=True))
        else:
            handles.append(entry.register_forward_hook(take_out, with_kwargs=True))
    edit.train(module.training)
    module.edits[key] = edit
    return handles


def _place(model: nn.Module, entry: Any) -> int:
    """Number of the text's tokens before the prompt."""
    pools = own_pooling(model) == "first" or getattr(entry, "pooler", None) is not None
    return 1 if pools and not model.config.is_encoder_decoder else 0  # type: ignore[union-attr]


def _blank(embedding: nn.Embedding, model: Any) -> int:
    """An id for the room that no model takes for padding."""
    padding = {embedding.padding_idx, getattr(model.config, "pad_token_id", None)}
    return next(i for i in range(3) if i not in padding)


def _limit(entry: Any, embedding: nn.Embedding) -> int | None:
    """How many positions a model has, if it looks them up in a table."""
    count = getattr(entry.config, "max_position_embeddings", None)
    for module in entry.modules():
        if isinstance(module, nn.Embedding) and module is not embedding and count and module.num_embeddings >= count:
            padding = module.padding_idx
            return count if padding is None else module.num_embeddings - padding - 1
    return None


def position_limit(model: nn.Module, site: Site) -> int | None:
    """How many positions the model around an embedding has, if it looks them up in a table."""
    module: Any = model.get_submodule(site.path)
    return _limit(model.get_submodule(site.entry), module)


def make_room(
    entry: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of the model that takes token ids."""
    module = entry.get_input_embeddings()
    edits = module.edits
    prompt = edits.prompt(module.weight.dtype)
    edits.pending, edits.count = None, 0
    if prompt is None:
        return None
    given: dict[str, Any] = {**dict(zip(edits.names, args, strict=False)), **kwargs}
    past, mask = given.get("past_key_values"), given.get("attention_mask")
    if mask is not None:
        if mask.ndim != 2:
            raise AttachError(f"a prompt needs an attention mask (batch, tokens), found {tuple(mask.shape)}")
        given["attention_mask"] = _insert(mask, mask.new_ones(1, len(prompt)), edits.at)
    if past is not None and past.get_seq_length() > 0:
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + len(prompt)
        return (), given
    edits.mask = mask
    _put_in(edits, prompt, given)
    return (), given


def _put_in(edits: InputEdits, prompt: Tensor, given: dict[str, Any]) -> None:
    """Room in whatever has a place for each token."""
    n, at, vectors = len(prompt), edits.at, given.get("inputs_embeds")
    check_room(edits.limit, n, (given["input_ids"] if vectors is None else vectors).shape[1])
    edits.count = n
    if vectors is None:
        ids = given["input_ids"]
        given["input_ids"] = _insert(ids, ids.new_full((1, n), edits.blank), at)
        edits.pending = prompt
    else:
        given["inputs_embeds"] = _insert(vectors, prompt[None].to(vectors.dtype), at)
    types, places = given.get("token_type_ids"), given.get("position_ids")
    if types is not None:
        given["token_type_ids"] = _insert(types, types[:, :1].expand(-1, n), at)
    if places is not None:
        first = places[:, :at] if at else places.new_full((len(places), 1), -1)
        room = first + torch.arange(1, n + 1, device=places.device)
        given["position_ids"] = torch.cat((places[:, :at], room, places[:, at:] + n), 1)


def check_room(limit: int | None, n: int, tokens: int) -> None:
    """Raises AttachError if prompt and text are longer than the model's table of positions."""
    if limit is not None and n + tokens > limit:
        shorter = f"max_length={limit - n} or a shorter prompt fits" if limit - n > 2 else "a shorter prompt fits"
        raise AttachError(
            f"a prompt of {n} and a text of {tokens} tokens need {n + tokens} positions, the model has {limit}; "
            f"{shorter}"
        )


def prompt_length(method: Method, site: Site) -> int:
    """How many vectors a method adds."""
    with torch.device("meta"):
        return len(method.tokens(method.settle(method.init(site), site), site))


def check_tokens(model: nn.Module, site: Site, method: Method) -> None:
    """Raises AttachError, before anything is touched, if an embedding cannot take a method's vectors."""
    module: Any = model.get_submodule(site.path)
    check_room(position_limit(model, site), prompt_length(method, site), 1)
    if hasattr(module, "edits"):
        raise AttachError(f"{type(module).__name__} at {site.path} already has an attribute 'edits'")


def fill(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Forward hook of the embedding: the prompt stands where room was made."""
    edits = module.edits
    prompt, edits.pending = edits.pending, None
    if prompt is None:
        return None
    at, n = edits.at, len(prompt)
    inside = prompt.to(output.dtype).expand(len(output), -1, -1)
    return torch.cat((output[:, :at], inside, output[:, at + n :]), 1)


def take_out(entry: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the model that takes token ids: of its hidden states (B, n + T, d), those of the text."""
    edits = entry.get_input_embeddings().edits
    n, edits.count = edits.count, 0
    if not n:
        return None
    cut = partial(_cut, at=edits.at, n=n)
    if "attention_mask" in kwargs:  # hooks behind this one pool the text's tokens by it
        kwargs["attention_mask"] = edits.mask
    edits.mask = None
    if isinstance(output, tuple):
        return (cut(output[0]), *output[1:])
    output["last_hidden_state"] = cut(output["last_hidden_state"])
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(map(cut, output["hidden_states"]))
    return output


def widen_cross(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a decoder: it sees the prompt among the encoder's states, whose mask is the text's."""
    states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
    if states is None or mask is None or states.shape[1] == mask.shape[1]:
        return None
    room = mask.new_ones(1, states.shape[1] - mask.shape[1])
    return args, {**kwargs, "encoder_attention_mask": _insert(mask, room, 0)}


def _insert(x: Tensor, room: Tensor, at: int) -> Tensor:
    """(B, T, ...) with (1 or B, n, ...) put in behind the first `at`."""
    return torch.cat((x[:, :at], room.expand(len(x), *room.shape[1:]), x[:, at:]), 1)


def _cut(x: Tensor, at: int, n: int) -> Tensor:
    return torch.cat((x[:, :at], x[:, at + n :]), 1)
