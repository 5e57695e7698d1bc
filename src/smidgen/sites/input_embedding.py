"""Where token ids become vectors, and how many positions a model has."""

from __future__ import annotations

from inspect import signature

from torch import nn
from transformers import PreTrainedModel

from smidgen.sites.discovery import find_blocks
from smidgen.sites.site import InputSite

# What a model may take beside a text, to put it among the embedded tokens.
BESIDE = {
    "pixel_values",
    "pixel_values_videos",
    "pixel_values_images",
    "image_pixel_values",
    "input_features",
    "input_values",
}


def find_input(model: nn.Module) -> list[InputSite]:
    """The embedding of a text's tokens, and as `entry` the model around it that takes their ids; none for others."""
    entry = _entry(model)
    try:
        embedding = None if entry is None else entry.get_input_embeddings()
    except NotImplementedError:  # Dia's encoder does not say where its embedding is
        return []
    if not isinstance(embedding, nn.Embedding):
        return []
    paths = {id(module): path for path, module in model.named_modules()}
    rows, width = embedding.num_embeddings, embedding.embedding_dim
    roles = frozenset({"embedding"})
    return [InputSite(paths[id(embedding)], roles, width_in=rows, width_out=width, entry=paths[id(entry)])]


def _entry(model: nn.Module) -> PreTrainedModel | None:
    """The innermost model around the blocks that takes ids: OPT's and others' heads pass the outer ones by."""
    if not isinstance(model, PreTrainedModel):
        return None
    stacks = find_blocks(model)
    coder = model.get_encoder() if model.config.is_encoder_decoder else model
    if len(stacks) != 1 and coder is model:
        return _around_images(model)
    blocks = [set(map(id, found)) for found in stacks.values()]
    found = [m for m in _takes_ids(coder) if any(inner <= set(map(id, m.modules())) for inner in blocks)]
    if found and coder is model and not _takes_more(found[-1]):
        outer = [m for m in _continues(model) if any(part is found[-1] for part in m.modules())]
        found += outer[-1:]  # also where it was built without a tower: it embeds, and makes the masks
    return found[-1] if found else None


def _takes_ids(model: nn.Module, *also: str) -> list[PreTrainedModel]:
    """Models in a model that take ids, from the outermost."""
    wanted = {"input_ids", *also}
    models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return [module for module in models if wanted <= set(signature(module.forward).parameters)]


def _takes_more(model: nn.Module) -> list[PreTrainedModel]:
    """Models in a model that take ids and images or sound, from the outermost."""
    return [module for module in _takes_ids(model) if BESIDE & set(signature(module.forward).parameters)]


def _continues(model: nn.Module) -> list[PreTrainedModel]:
    """Those of them that go on with a text behind a cache, and generate by their own forward (not Kosmos-2)."""
    found = (m for m in _takes_more(model) if "past_key_values" in signature(m.forward).parameters)
    return [module for module in found if "generate" not in vars(type(module))]


def _around_images(model: PreTrainedModel) -> PreTrainedModel | None:
    """The model that puts images among a language model's embedded tokens; none where texts are not gone on with."""
    decoder = model.get_decoder()
    around = [m for m in _continues(model) if any(part is decoder for part in list(m.modules())[1:])]
    stacks = find_blocks(decoder)
    return around[-1] if around and len(stacks) == 1 and isinstance(decoder, PreTrainedModel) else None


def _limit(entry: PreTrainedModel, embedding: nn.Embedding) -> int | None:
    """How many positions a model has, if it looks them up in a table."""
    count = getattr(entry.config.get_text_config(), "max_position_embeddings", None)
    for module in entry.get_decoder().modules():
        if isinstance(module, nn.Embedding) and module is not embedding and 0 < (count or 0) <= module.num_embeddings:
            padding = module.padding_idx
            return count if padding is None else module.num_embeddings - padding - 1
    return None


def position_limit(model: nn.Module, site: InputSite) -> int | None:
    """How many positions the model around an embedding has, if it looks them up in a table."""
    entry, embedding = model.get_submodule(site.entry), model.get_submodule(site.path)
    assert isinstance(entry, PreTrainedModel)  # as `find_input` found them
    assert isinstance(embedding, nn.Embedding)
    return _limit(entry, embedding)
