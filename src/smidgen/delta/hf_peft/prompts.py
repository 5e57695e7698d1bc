"""Prefix and PromptTuning, to and from PEFT's PREFIX_TUNING and PROMPT_TUNING adapters.

PEFT keeps a prefix in the cache of keys and values, where it counts as n tokens: the text's positions begin at n. Here
the text keeps its positions. Rotary attention sees differences of positions only, so K here is PEFT's turned back by n
positions; models that look positions up in a table compute something else, and are refused. Whether both are the same
function is not taken from a list of models: it is computed, on the model itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from smidgen.common.errors import DeltaError
from smidgen.common.module_modes import evaluating
from smidgen.delta.attaching import attached
from smidgen.delta.hf_peft.adapter_files import PROMPT, task_type
from smidgen.delta.hf_peft.reading import Reader, Values
from smidgen.delta.hf_peft.writing import Parts, Placed
from smidgen.methods.attention.prefix import Prefix
from smidgen.methods.base import Method
from smidgen.methods.prompt.prompt_tuning import PromptTuning
from smidgen.planning.resolution import resolve
from smidgen.ports.attachment_record import trained_parameters
from smidgen.sites.site import InputSite, KeyValueSite, Site
from smidgen.sites.task_head import own_pooling

STATIC = ("default", "linear", "llama3", "yarn")  # rotary frequencies that no length of text changes
TOKENS = 8  # of the text on which both functions are compared

Refuse = Callable[[str], DeltaError]


def read_prefix(reader: Reader) -> tuple[Method, Values]:
    """Keys and values of all layers from one table: (n, layers * 2 * heads * head_dim), keys first.

    `prefix_projection` has no effect: PEFT saves what the network gives.
    """
    model, refuse = cast(PreTrainedModel, reader.model), reader.refusal
    n = _count(reader)
    method = Prefix(length=n)
    frequencies = _check_prefix(model, refuse)
    sites = [entry.site for entry in resolve(model, method).entries]
    shape = _shape(model, sites, n, refuse)
    whole = reader.shaped(PROMPT, reader.adapter.added[PROMPT], (n, shape[1:].numel()))
    values: Values = {}
    for site, pair in zip(sites, whole.view(shape).permute(1, 2, 3, 0, 4), strict=True):
        values[f"{site.name}.K"] = _turned(pair[0], frequencies, -n)
        values[f"{site.name}.V"] = pair[1].contiguous()
    _prove(model, method, _with_cache, refuse)
    return method, values


def write_prefix(method: Method, sites: list[Placed], inside: nn.Module) -> Parts:
    """The inverse of `read_prefix`."""
    model = cast(PreTrainedModel, inside)
    refuse, n = _naming(method), len(sites[0].tensors["K"][0])
    frequencies = _check_prefix(model, refuse)
    if len(sites) < len(resolve(model, Prefix(length=n)).entries):
        raise refuse("PEFT puts a prefix into every layer; only layers=None can be written")
    shape = _shape(model, [site for site, _ in sites], n, refuse)
    _prove(model, method, _with_cache, refuse)
    pairs = [torch.stack((_turned(t["K"], frequencies, n), t["V"])) for _, t in sites]
    whole = (
        torch.stack(pairs).to(sites[0].tensors["V"]).permute(3, 0, 1, 2, 4).reshape(n, -1)
    )  # (n, layers, 2, heads, head_dim) flattened
    width = shape[3] * shape[4]
    fields = {"token_dim": width, "num_attention_heads": shape[3], "num_layers": shape[1], "encoder_hidden_size": width}
    return Parts({PROMPT: whole}, {"peft_type": "PREFIX_TUNING", "prefix_projection": False, **_common(n), **fields})


def read_prompt(reader: Reader) -> tuple[Method, Values]:
    """Vectors in front of the text. Of two submodules' (encoder-decoders), PEFT uses the first, and so does this."""
    n, config, model = _count(reader), reader.adapter.config, cast(PreTrainedModel, reader.model)
    method = PromptTuning(length=n)
    _check_prompt(model, reader.refusal)
    (entry,) = resolve(model, method).entries
    assert isinstance(entry.site, InputSite)
    rows = n * (config.get("num_transformer_submodules") or 1)
    whole = reader.shaped(PROMPT, reader.adapter.added[PROMPT], (rows, entry.site.width_out))
    _prove(model, method, _with_vectors, reader.refusal)
    return method, {f"{entry.site.name}.P": whole[:n].contiguous()}


def write_prompt(method: Method, sites: list[Placed], inside: nn.Module) -> Parts:
    """The vectors as they are."""
    model = cast(PreTrainedModel, inside)
    refuse, vectors = _naming(method), sites[0].tensors["P"]
    _check_prompt(model, refuse)
    _prove(model, method, _with_vectors, refuse)
    fields = {"peft_type": "PROMPT_TUNING", "token_dim": vectors.shape[1], **_common(len(vectors))}
    return Parts({PROMPT: vectors}, fields)


def _naming(method: Method) -> Refuse:
    return lambda text: DeltaError(f"{method} cannot be written for PEFT: {text}")


def _common(n: int) -> dict[str, int]:
    return {"num_virtual_tokens": n, "num_transformer_submodules": 1}


def _count(reader: Reader) -> int:
    """The number of vectors, from a file that PEFT itself would use for this model's task."""
    n, task = reader.adapter.config.get("num_virtual_tokens"), reader.adapter.config.get("task_type")
    if type(n) is not int or n < 1:
        raise reader.refusal(f"num_virtual_tokens={n!r} is not a whole number above 0")
    if task != task_type(reader.model):
        raise reader.refusal(
            f"task_type={task!r}, but {type(reader.model).__name__} is {task_type(reader.model)!r}; PEFT places a "
            "prompt by it"
        )
    return n


def _check_prefix(model: PreTrainedModel, refuse: Refuse) -> Tensor:
    """The rotary frequencies of a model in which a prefix in the cache can be one beside it."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None or task_type(model) is None:
        raise refuse(f"PEFT leaves a prefix out of {name}, for which it has no task_type")
    if config.is_encoder_decoder:
        raise refuse(f"PEFT puts it into the decoder's self-attention of {name} alone, and counts it as positions")
    rotary = [(m, found) for m in model.modules() if isinstance(found := getattr(m, "inv_freq", None), Tensor)]
    if not rotary or any(not torch.equal(found, rotary[0][1]) for _, found in rotary):
        raise refuse(
            f"PEFT counts it as positions, so the text of {name} would get others: equal only with one set of rotary "
            "positions"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (getattr(config, "sliding_window", None) and not _full(config)):
        raise refuse(f"PEFT lets a prefix leave the sliding window of {name}; here every token sees it")
    first, frequencies = rotary[0]
    kind = getattr(first, "rope_type", "default")
    if kind not in STATIC:
        raise refuse(f"rotary positions of type {kind!r} depend on the length, in which PEFT counts a prefix")
    return frequencies


def _full(config: object) -> bool:
    """Whether a window in the configuration is not used: layers say so one by one, or all at once."""
    return bool(getattr(config, "layer_types", None)) or getattr(config, "use_sliding_window", True) is False


def _shape(model: PreTrainedModel, sites: list[Site], n: int, refuse: Refuse) -> torch.Size:
    """(n, layers, 2, heads, head_dim) of PEFT's table."""
    attentions = [site for site in sites if isinstance(site, KeyValueSite)]
    shapes = {(site.heads, width) for site in attentions for width in (site.head_dim, site.value_dim)}
    if len(shapes) > 1 or len(sites) != model.config.num_hidden_layers:
        raise refuse(
            f"{type(model).__name__} has {len(sites)} attentions in {model.config.num_hidden_layers} layers, of "
            f"{len(shapes)} shapes; PEFT's table has one shape for every layer"
        )
    return torch.Size((n, len(sites), 2, *shapes.pop()))


def _turned(keys: Tensor, frequencies: Tensor, by: int) -> Tensor:
    """Keys (heads, n, head_dim) turned by so many rotary positions, in float64; pairs run from half to half."""
    half = len(frequencies)
    one, other, rest = keys.double().split((half, half, keys.shape[-1] - 2 * half), dim=-1)
    angle = by * frequencies.double().to(keys.device)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((one * cos - other * sin, other * cos + one * sin, rest), dim=-1)


def _check_prompt(model: PreTrainedModel, refuse: Refuse) -> None:
    """PEFT feeds vectors in front of everything and leaves their places in what the model gives."""
    name, task = type(model).__name__, task_type(model)
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return
    if task == "SEQ_CLS" and own_pooling(model) == "last":
        raise refuse(
            f"without token ids {name} cannot tell padding, so PEFT's reads the last place of each row; equal only for "
            "language models"
        )
    raise refuse(
        f"PEFT puts the prompt in front of {name}'s first token, and what reads that token reads the prompt; equal "
        "only for language models"
    )


def _prove(model: PreTrainedModel, method: Method, theirs: Callable[..., Tensor], refuse: Refuse) -> None:
    """Both functions on one short text, with values drawn at random: they must agree."""
    ids, more = _text(model)
    with evaluating(model), torch.no_grad():
        plain = model(input_ids=ids, **more).logits
        with attached(model, method):
            values = {n: p for n, p in trained_parameters(model).items() if ".edits." in n}
            generator = torch.Generator().manual_seed(0)
            for parameter in values.values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            ours = model(input_ids=ids, **more).logits
            drawn = {n: p.detach().clone() for n, p in values.items()}
        other = theirs(model, ids, more, list(drawn.values()))
    least = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    if not bool((ours - other).abs().max() <= least * (ours - plain).abs().max()):
        raise refuse(f"{type(model).__name__} computes something else with PEFT's (found by running both on one text)")


def _text(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    words = [i for i in range(TOKENS + 1) if i != model.config.pad_token_id][:TOKENS]
    ids = torch.tensor([words], device=model.device) % model.config.get_text_config().vocab_size
    return ids, {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}


def _with_cache(model: PreTrainedModel, ids: Tensor, more: dict[str, Tensor], values: list[Tensor]) -> Tensor:
    """Logits with K, V, K, V, ... where PEFT puts them."""
    frequencies = _check_prefix(model, DeltaError)
    turned = [_turned(K, frequencies, K.shape[1]) for K in values[::2]]
    pairs = [(K[None].to(model.dtype), V[None].to(model.dtype)) for K, V in zip(turned, values[1::2], strict=True)]
    logits: Tensor = model(input_ids=ids, past_key_values=DynamicCache(pairs), **more).logits
    return logits


def _with_vectors(model: PreTrainedModel, ids: Tensor, more: dict[str, Tensor], values: list[Tensor]) -> Tensor:
    """Logits of the text with vectors fed in front of its own."""
    vectors = torch.cat((values[0][None].to(model.dtype), model.get_input_embeddings()(ids)), dim=1)
    logits: Tensor = model(inputs_embeds=vectors, **more).logits
    return logits[:, -ids.shape[1] :]
