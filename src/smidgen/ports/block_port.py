"""The block port: hidden states on their way from one block to the next, with what the model knows of their tokens.

An edit stands at the block that the states leave. Where one lets fewer tokens go on, every block above gets masks,
positions and whatever else is as long as the text for the tokens that are left, and behind the last block each token
reads its place: norms, heads, poolings, labels and metrics see the text as it came.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel

from smidgen.common.errors import AttachError
from smidgen.common.hook_types import Args, Kwargs, first_of, like
from smidgen.methods.capabilities import EditsStates, ShortensText
from smidgen.methods.token_map import TokenMap
from smidgen.planning.entry import Entry
from smidgen.planning.rules.blocks import BlockRules
from smidgen.ports.base import Port
from smidgen.ports.edit import Edit, EditedModule, Edits, drop_edits, edits_at, give_edits, put_edit
from smidgen.ports.forward_state import Stream, state
from smidgen.sites.site import BlockSite, Site, StackSite

POSITIONS = ("position_ids", "position_embeddings", "position_embeddings_global", "position_embeddings_local")


class BlockEdits(Edits[Edit]):
    """The edits at one block, and its place in the stack."""

    def __init__(self, stack: str, last: bool) -> None:
        super().__init__()
        self.stack, self.last = stack, last


class BlockPort(BlockRules, Port):
    """Blocks of a stack."""

    def check(self, model: nn.Module, entry: Entry) -> None:
        """Raises AttachError if a block has an attribute of the edits' name."""
        assert isinstance(entry.site, BlockSite)
        for path in entry.site.blocks:
            module = model.get_submodule(path)
            if hasattr(module, "edits") and not edits_at(module, BlockEdits):
                raise AttachError(f"{type(module).__name__} at {path} already has an attribute 'edits'")

    def place(self, model: nn.Module, site: Site, key: str, edit: Edit) -> list[RemovableHandle]:
        """At the block; one that shortens the text has hooks at all blocks above."""
        assert isinstance(site, BlockSite)
        layer = site.blocks.index(site.path)
        shortens, around = isinstance(edit.method, ShortensText), model_around(model, site.stack)
        for path in site.blocks[layer:] if shortens else (site.path,):
            module = model.get_submodule(path)
            if not edits_at(module, BlockEdits):
                give_edits(
                    module,
                    BlockEdits(site.stack, path == site.blocks[-1]),
                    module.register_forward_pre_hook(enter_block, with_kwargs=True),
                    module.register_forward_hook(leave_block),
                )
        put_edit(model.get_submodule(site.path), key, edit)
        return [around.register_forward_pre_hook(partial(note_text, site.stack), with_kwargs=True)]

    def remove(self, model: nn.Module, site: Site) -> None:
        """Take all edits off the stack's blocks."""
        assert isinstance(site, BlockSite)
        for path in site.blocks:
            module = model.get_submodule(path)
            if edits_at(module, BlockEdits):
                drop_edits(module)


def model_around(model: nn.Module, stack: str) -> nn.Module:
    """The innermost model of transformers around a stack, which is called with its tokens' mask; else the whole."""
    while stack:
        stack = stack.rpartition(".")[0]
        if isinstance(module := model.get_submodule(stack), PreTrainedModel):
            return module
    return model


def note_text(stack: str, around: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """Forward pre-hook of the model around a stack: what it is told of the tokens."""
    names = tuple(inspect.signature(type(around).forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mask = given.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        found = f"one of {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise AttachError(f"edits of the blocks in {stack} need an attention mask (batch, tokens), found {found}")
    caches = (value for value in given.values() if isinstance(value, Cache))
    cached = sum(int(cache.get_seq_length()) for cache in caches)
    state().streams[stack] = Stream(None if mask is None else mask[:, cached:], given.get("position_ids"), cached)


def enter_block(module: EditedModule[BlockEdits], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
    """Forward pre-hook of a block: what is as long as the text becomes as long as what is left of it."""
    stream = state().streams.get(module.edits.stack)
    if stream is None or stream.tokens is None or not stream.tokens.shortened:
        return None
    names = tuple(inspect.signature(type(module).forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    states, *others = given  # the first argument is what the blocks hand on
    shorter = {name: shortened(name, given[name], stream.tokens, type(module).__name__) for name in others}
    return (), {states: given[states], **shorter}


def shortened(name: str, value: object, tokens: TokenMap, block: str) -> object:
    """An argument of a block for the tokens that are left.

    Raises:
        AttachError: it is as long as the text, and its layout is not known; or it is a cache that is in use.
    """
    length = tokens.where.shape[1]
    if isinstance(value, tuple | list) and name in POSITIONS:
        return type(value)(tokens.pick(part, -2) for part in value)
    if isinstance(value, Mapping | tuple | list):
        raise AttachError(f"{block} gets {name} in a {type(value).__name__}, which cannot be shortened with the text")
    if not isinstance(value, Tensor) or length not in value.shape:
        return value
    if name == "cache_position":
        return value[: tokens.count]
    if name == "position_ids":
        return tokens.pick(value, -1)
    if name in POSITIONS:
        return tokens.pick(value, -2)
    if "mask" in name or "bias" in name:
        for axis in (-1, -2) if value.ndim > 2 else (-1,):
            value = tokens.pick(value, axis) if value.shape[axis] == length else value
        return value
    raise AttachError(
        f"{block} gets {name} of the shape {tuple(value.shape)} for a text of {length} tokens; how that is shortened "
        "with the text is not known, so no method that shortens it acts here"
    )


def leave_block(module: EditedModule[BlockEdits], args: Args, output: object) -> object:
    """Forward hook of a block: its edits, left to right; behind the last block, each token's own place again."""
    edits, streams = module.edits, state().streams
    states, rest = first_of(output)
    for edit in edits.all():
        if edit.enabled:
            stream = streams.setdefault(edits.stack, Stream())
            if stream.cached and isinstance(edit.method, ShortensText):
                raise AttachError(
                    f"{edit.method} shortens the text, and what is in a cache was not; use_cache=False works"
                )
            states, stream.tokens = edited(edit, states, stream.tokens or seen(states, edit))
    if edits.last:
        left = streams.pop(edits.stack, Stream()).tokens
        states = left.spread(states) if left is not None and left.shortened else states
    return like(output, states, rest)


def seen(states: Tensor, edit: Edit) -> TokenMap:
    """The tokens of hidden states that are whole.

    Raises:
        AttachError: these are no hidden states (B, T, width), or the mask is not theirs.
    """
    site = edit.site
    assert isinstance(site, BlockSite | StackSite)
    if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[-1] != site.width:
        found = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
        raise AttachError(f"{edit.method} needs hidden states (batch, tokens, {site.width}), {site.path} gives {found}")
    stream = state().streams.get(site.stack, Stream())
    try:
        return TokenMap.whole(states, stream.mask, stream.positions)
    except ValueError as error:
        raise AttachError(f"{edit.method} at {site.path}: {error}") from None


def edited(edit: Edit, states: Tensor, tokens: TokenMap) -> tuple[Tensor, TokenMap]:
    """Hidden states after one edit, in their dtype, and the tokens that are left.

    Raises:
        AttachError: what the method gives does not fit together.
    """
    method, site = edit.method, edit.site
    found = states
    if isinstance(method, EditsStates):
        found = method.states(edit.cast(states.dtype), states, tokens, site).to(states.dtype)
        if found.shape != states.shape:
            raise AttachError(f"{method} gives hidden states {tuple(found.shape)} for {tuple(states.shape)}")
    if not isinstance(method, ShortensText):
        return found, tokens
    short, places = method.shorten(edit.cast(found.dtype), found, tokens, site)
    if short.ndim != 3 or (len(short), short.shape[2]) != (len(states), states.shape[2]):
        raise AttachError(f"{method} gives hidden states {tuple(short.shape)} for {tuple(states.shape)}")
    try:
        return short.to(states.dtype), tokens.shorten(places, short.shape[1])
    except ValueError as error:
        raise AttachError(f"{method} at {site.path}: {error}") from None
