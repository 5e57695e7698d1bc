"""A tiny random model of any type that transformers has, with an input that it accepts; nothing is downloaded.

    model, inputs = tiny("qwen3", "Qwen3ForSequenceClassification")

A configuration at its defaults is shrunk by the names of its fields, nested ones as well; what a type needs beyond
that stands in TYPES. Every tensor is shaken: the zeros and ones of fresh models hide half the mathematics.
"""

import copy
import inspect
import os
import re
import traceback
from dataclasses import dataclass

import torch
import transformers as T
from transformers.models.auto import configuration_auto, modeling_auto

VERBOSE = bool(os.environ.get("TINY_VERBOSE"))
LABELS = 7
WORDS = 96  # size of every vocabulary
TASKS = {
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "video": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "base": "MODEL_MAPPING_NAMES",
}


class NotBuiltError(Exception):
    """transformers itself does not run here; the reason in one line."""


@dataclass(frozen=True)
class Pair:
    """A model type and one of its classes."""

    type: str
    cls: str
    task: str

    def __str__(self):
        return f"{self.type}/{self.cls}"


def pairs():
    """Every type with its LM class (or its plain one where it has no other) and its classes for a task."""
    owners = {}
    for task, mapping in TASKS.items():
        for kind, names in getattr(modeling_auto, mapping).items():
            owners.setdefault(names if isinstance(names, str) else names[0], {})[kind] = task
    chosen = {}
    for name, kinds in owners.items():
        near = [k for k in kinds if name.lower().startswith(re.sub(r"[^a-z0-9]", "", k))]
        kind = max(near, key=len, default=next(iter(kinds)))
        chosen.setdefault(kind, {})[kinds[kind]] = name
    found = []
    for kind in configuration_auto.CONFIG_MAPPING_NAMES:
        mine = chosen.get(kind, {})
        left_out = {"causal-lm"} if "masked-lm" in mine else set()
        left_out |= {"base"} if mine.keys() - {"base"} else set()
        found += [Pair(kind, name, task) for task, name in mine.items() if task not in left_out and hasattr(T, name)]
    return found


# ---------------------------------------------------------------------------------------------- configurations


@dataclass(frozen=True)
class Sizes:
    """What a shrunk configuration has everywhere."""

    width: int = 32
    heads: int = 4
    inner: int = 64
    image: int = 32
    patch: int = 8
    positions: int = 64

    @property
    def head(self):
        return self.width // self.heads


SIZES = (Sizes(), Sizes(image=64), Sizes(width=64, inner=128), Sizes(width=64, inner=128, image=64))
# first pattern that matches the whole name of a field -> what it becomes, from (sizes, value)
RULES = [
    (r".*(vocab_size|vocab_size_.*|num_embeddings|.*codebook_size)", lambda s, v: min(v, WORDS)),
    (r".*(num_codebooks|num_quantizers)", lambda s, v: min(v, 2)),
    (r"(.*_)?(num_)?(kv_heads|key_value_heads|num_kv_heads|query_groups|attention_groups).*", None),  # see below
    (r"(.*_)?(num_|n_)?(attention_|attn_)?heads?(_num)?|.*attention_heads|.*_n_heads?|n_heads?|num_heads|.*_num_heads|nhead", lambda s, v: s.heads if v > 1 else v),
    (r"qk_head_dim", lambda s, v: 2 * s.head),
    (r"(.*_)?(head_dim|d_kv|attention_head_size|head_size|dim_head|kv_channels|d_head|head_width|dim_per_head|.*head_dim)", lambda s, v: s.head),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|d_inner|ffn_hidden_size|inner_dim|mlp_dim|n_inner|feedforward_dim|dim_feedforward|feed_forward_size|ffn_intermediate_size|linear_units|feed_forward_hidden_size|mlp_hidden_size|ff_dim|.*intermediate_size|mlp_hidden_dim|.*_ffn_dim|ff_size)", lambda s, v: s.inner),
    (r"(.*_)?(q|kv|o|qk|gate|decay|low|in|out|v|a|aaa|index|value)_?(lora|low)_(rank|dim).*|.*lora_rank|.*_rank", lambda s, v: min(v, 16)),
    (r"(num_|n_)?(hidden_layers|layers?|encoder_layers|decoder_layers|blocks?)|.*(num_hidden_layers|_num_layers|num_layers|n_layers?|_layers|_depth|_num_blocks|num_blocks)|depth", lambda s, v: min(v, 2)),
    (r".*(max_position_embeddings|n_positions|max_positions?|max_source_positions|max_target_positions|max_seq_len|max_sequence_length|max_seq_length|n_ctx|seq_length|max_length_positions|max_2d_position_embeddings|context_length_)", lambda s, v: min(v, s.positions)),
    (r"(num_experts_per_tok|moe_topk|moe_k|num_experts_per_token|top_k|moe_top_k|topk|num_selected_experts|expert_top_k|moe_router_topk|router_top_k|n_activated_experts|.*_topk|.*experts_per_tok)", lambda s, v: min(v, 2)),
    (r"(n_shared_experts|moe_num_shared_experts|num_shared_experts|n_group|topk_group|num_expert_group|n_groups?)", lambda s, v: 1),
    (r".*(num_(local_|routed_|moe_)?experts|n_routed_experts|experts|num_experts_.*)", lambda s, v: min(v, 4)),
    (r"(state_size|.*d_state|ssm_state_size|mamba_state_dim)", lambda s, v: min(v, 8)),
    (r"(.*_)?chunk_size.*", lambda s, v: min(v, 8)),
    (r"(sliding_window|.*attention_window|local_attention|local_window_size|attention_window_size)", lambda s, v: min(v, 8)),
    (r".*window_size", lambda s, v: min(v, 2)),
    (r"(.*_)?(image_size|img_size|input_size|crop_size|.*_image_size)", lambda s, v: min(v, s.image)),
    (r"(.*_)?(patch_size|patch_size_.*)", lambda s, v: s.patch if v >= 8 else v),
    (r"(.*_)?(num_mel_bins|num_mels|n_mels|feature_size|num_mel_bins|mel_bins)", lambda s, v: min(v, 16)),
    (r"(.*_)?(num_queries|num_query_tokens|n_queries|resampler_n_latents|num_latents|num_object_queries)", lambda s, v: min(v, 4)),
    (r"(.*_)?(num_frames|frames|tubelet_frames)", lambda s, v: min(v, 4)),
    (r"num_conv_pos_embeddings", lambda s, v: 8),
    (r"num_conv_pos_embedding_groups|.*norm_num_groups|.*num_groups", lambda s, v: min(v, 4)),
    (r"codevector_dim|proj_codevector_dim|xvector_output_dim|classifier_proj_size", lambda s, v: s.width),
    (r".*(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|embedding_dim|projection_dim|proj_dim|proj_size|model_dim|hidden_channels|embed_proj_dim|lstm_dim|cross_attention_dim|output_dim|width|out_dim|mm_tokens_dim|_dim|_hidden_dims|_channels_dim|hidden_sizes|hidden_width)|dim|d_embed|lru_width|attention_size|attention_hidden_size|d_latents", lambda s, v: s.width if v >= 16 else v),
]
RULES = [(re.compile(pattern), rule) for pattern, rule in RULES]
KV = RULES[2][0]
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers", "depth", "decoder_layers")
TOKENS = {"pad": 0, "bos": 1, "eos": 2, "sep": 3, "cls": 4, "mask": 5, "unk": 6, "decoder_start": 1}
DROPS = re.compile(r".*(drop|mask_time_prob|mask_feature_prob|mask_prob|spec_augment|jitter).*")
RATIOS = re.compile(r"(.*_)?(hidden_sizes|embed_dims|dims|conv_dim|channels|hidden_channels|encoder_hidden_sizes|block_out_channels|neck_hidden_sizes|fusion_hidden_sizes|num_channels_list|layer_widths|encoder_in_channels|decoder_in_channels|out_channels|tdnn_dim|d_models?|widths)")
COUNTS = re.compile(r"(.*_)?(depths|layers|stage_blocks|num_blocks|block_repeats|num_hidden_layers|depth)")


def shrink(config, sizes=SIZES[0], ids=None):
    """The configuration, shrunk in place, with dropout at 0 and its special tokens inside a vocabulary of 96."""
    ids = {} if ids is None else ids
    _layers(config)
    heads = next((getattr(config, n) for n in ("num_attention_heads", "n_head", "num_heads") if hasattr(config, n)), None)
    for name, value in list(vars(config).items()):
        if isinstance(value, T.PreTrainedConfig):
            shrink(value, sizes, ids)
            continue
        new = _shrunk(name, value, sizes, heads, ids)
        if new is not value and new != value:
            object.__setattr__(config, name, new)
    if getattr(config, "pad_token_id", 0) is None:
        object.__setattr__(config, "pad_token_id", 0)
    return config


def _shrunk(name, value, sizes, heads, ids):
    if isinstance(value, bool) or value is None:
        return value
    if DROPS.fullmatch(name):
        return type(value)(0) if isinstance(value, int | float) else value
    if re.fullmatch(r".*(token_id|token_index|token_ids|_id|_token)s?", name) and not name.startswith(("num", "max")):
        return _token(name, value, ids)
    if isinstance(value, dict):
        return _mapping(name, value, sizes)
    if isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
        return type(value)(_several(name, value, sizes))
    if type(value) is int:
        return _one(name, value, sizes, heads)
    return value


def _one(name, value, sizes, heads):
    for pattern, rule in RULES:
        if pattern.fullmatch(name):
            if pattern is KV:
                return value if value == 1 else sizes.heads if value == heads or heads is None else sizes.heads // 2
            return rule(sizes, value)
    return value


def _several(name, values, sizes):
    if COUNTS.fullmatch(name) and max(values) < 100:
        return [1] * len(values)
    if RATIOS.fullmatch(name) and max(values) >= 16:
        smallest = min(v for v in values if v > 3)
        return [v if v <= 3 else max(8, round(16 * v / smallest)) for v in values]
    if re.fullmatch(r".*(heads|heads_list)", name):
        return [max(1, round(v / min(values))) if min(values) else v for v in values]
    return [_one(name, v, sizes, None) for v in values]


def _token(name, value, ids):
    if isinstance(value, list | tuple):
        return [_token(name, value[0], ids)] if value and type(value[0]) is int else value
    if type(value) is not int or value < 0:
        return value
    for part, number in TOKENS.items():
        if name == f"{part}_token_id":
            return number
    return ids.setdefault(name, WORDS - 2 - len(ids))


def _mapping(name, value, sizes):
    new = copy.deepcopy(value)
    for key, inner in value.items():
        if isinstance(inner, dict):
            new[key] = _mapping(key, inner, sizes)
        elif key in ("mrope_section", "mrope_sections", "xdrope_section"):
            turned = int(sizes.head * (value.get("partial_rotary_factor") or 1)) // 2
            new[key] = _split(turned, len(inner))
        elif key in ("long_factor", "short_factor"):
            new[key] = inner[: max(1, round(sizes.head // 2))]
    return new


def _split(total, parts):
    sections = [total // parts] * parts
    sections[0] += total - sum(sections)
    return sections


def _layers(config):
    """Keep one layer of each kind, and no fewer than two: of every list that is as long as the layers are many."""
    known = vars(config)
    name = next((n for n in LAYERS if type(known.get(n)) is int), None)
    if name is None:
        return
    number = known[name]
    lists = {n: v for n, v in known.items() if isinstance(v, list | tuple) and len(v) == number and number > 2}
    kinds = list(zip(*lists.values(), strict=True)) if lists else []
    if kinds and not all(isinstance(v, str | int | bool | None) for row in kinds for v in row):
        kinds = []
    firsts = sorted(kinds.index(kind) for kind in dict.fromkeys(kinds))[:4]
    rest = [i for i in range(number) if i not in firsts]
    kept = sorted(firsts + rest[: max(0, 2 - len(firsts))]) or list(range(min(2, number)))
    for key, values in lists.items():
        object.__setattr__(config, key, type(values)(values[i] for i in kept))
    if len(kept) > 2:
        object.__setattr__(config, name, _Fixed(len(kept)))


class _Fixed(int):
    """A whole number that no rule changes: `type(value) is int` is false for it."""


# ---------------------------------------------------------------------------------------------- what a type needs

TYPES = {}


def configure(kind, task, sizes):
    """The shrunk configuration of a type."""
    cls = configuration_auto.CONFIG_MAPPING[kind]
    config = adjust(shrink(cls(), sizes), sizes)
    if task in ("sequence", "token", "image", "video", "audio"):
        for part in parts(config):
            part.num_labels = LABELS
    return config


def adjust(config, sizes):
    if "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
        rope = getattr(config, "rope_parameters", None)
        if isinstance(rope, dict) and "mrope_section" not in rope:
            turned = int(sizes.head * (rope.get("partial_rotary_factor") or 1)) // 2
            rope["mrope_section"] = _split(turned, 3)
    for name, value in vars(config).items():
        if isinstance(value, T.PreTrainedConfig):
            adjust(value, sizes)
    for name, value in TYPES.get(config.model_type, {}).items():
        object.__setattr__(config, name, value(config, sizes) if callable(value) else value)
    for name, value in list(vars(config).items()):
        if isinstance(value, _Fixed):
            object.__setattr__(config, name, int(value))
    return config


# ---------------------------------------------------------------------------------------------- inputs

BATCH, LENGTH = 2, 8


def parts(config):
    """The configuration and those inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, T.PreTrainedConfig):
            yield from parts(value)


def look(config, *names, default=None):
    """The first of several fields that the configuration, or one inside it, has."""
    for name in names:
        for part in parts(config):
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def _floats(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def _ids(config, length=LENGTH):
    words = min(w for w in [WORDS - 24, look(config, "vocab_size", default=WORDS)] if w)
    low = min(8, words - 1)
    return torch.randint(low, words, (BATCH, length), generator=torch.Generator().manual_seed(6))


def _square(value):
    return tuple(value)[-2:] if isinstance(value, list | tuple) else (value, value)


def _pixels(config):
    """Images in the layouts that models take: one each, one of several each, patches in a row, frames."""
    size = _square(look(config, "image_size", "img_size", "input_size", default=32))
    channels = look(config, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if type(channels) is int else 3
    patch = _square(look(config, "patch_size", default=8))
    yield {"pixel_values": _floats(BATCH, channels, *size)}
    yield {"pixel_values": _floats(BATCH, 1, channels, *size)}
    frames = look(config, "num_frames", "frames_per_clip", default=2)
    yield {"pixel_values": _floats(BATCH, frames, channels, *size)}
    row = channels * patch[0] * patch[1]
    yield {"pixel_values": _floats(BATCH, 16, row)}


def _grid(config, name):
    """Patches in a row, with the grid that they came from: 4 x 4 for each image."""
    channels = look(config, "in_channels", "num_channels", "in_chans", default=3)
    patch = _square(look(config, "patch_size", default=8))
    times = look(config, "temporal_patch_size", default=1)
    times = times if type(times) is int else times[0]
    grid = torch.tensor([[1, 4, 4]] * BATCH)
    for depth in dict.fromkeys((times, 1)):
        row = channels * depth * patch[0] * patch[1]
        yield {"pixel_values": _floats(16 * BATCH, row), name: grid if name.endswith("thw") else grid[:, 1:]}
    yield {"pixel_values": _floats(16 * BATCH, channels, *patch), name: grid if name.endswith("thw") else grid[:, 1:]}


def _sounds(config, name):
    """Features of sound: (batch, bins, time) and (batch, time, bins); raw samples."""
    bins = look(config, "num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", "input_dim", default=16)
    times = 2 * look(config, "max_source_positions", "n_ctx", default=32)
    long = look(config, "max_length", default=64)
    if name == "input_values":
        yield {name: _floats(BATCH, 4000)}
        yield {name: _floats(BATCH, 1, 4000)}
        yield {name: _floats(BATCH, long, bins)}
    else:
        yield {name: _floats(BATCH, bins, times)}
        yield {name: _floats(BATCH, times, bins)}
        yield {name: _floats(BATCH, 64, bins)}
        yield {name: _floats(BATCH, bins, 64)}
        yield {name: _floats(BATCH, 1, 64, bins)}


def _texts(config, names):
    """Arguments beside the ids that a text has."""
    found = {}
    if "attention_mask" in names:
        found["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if "mm_token_type_ids" in names:
        found["mm_token_type_ids"] = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    if "bbox" in names:
        found["bbox"] = torch.tensor([1, 2, 5, 7]).expand(BATCH, LENGTH, 4).contiguous()
    return found


def _decoder(config, names):
    if "decoder_input_ids" in names:
        yield {"decoder_input_ids": _ids(config, 6)}
    yield {}


def candidates(model, task):
    """Inputs to try, likely ones first."""
    names = inspect.signature(model.forward).parameters
    config = model.config
    required = {n for n, p in names.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    text = {"input_ids": _ids(config)} | _texts(config, names)
    main = model.main_input_name
    sees = [n for n in names if n.startswith("pixel_values") and "video" not in n][:1]
    hears = [n for n in names if n in ("input_features", "input_values", "audio_values")][:1]
    grid = next((n for n in names if n.startswith("image_grid") or n in ("spatial_shapes",)), None)
    pictures = [*(_grid(config, grid) if grid else ()), *_pixels(config)] if sees else []
    pictures = [{sees[0] if k == "pixel_values" else k: v for k, v in p.items()} for p in pictures]
    sounds = list(_sounds(config, hears[0])) if hears else []
    decoder = list(_decoder(config, names))
    words = "input_ids" in names
    if words and (sees or hears):
        for thing in pictures + sounds:
            yield text | thing | decoder[0]
        for thing in pictures + sounds:
            yield text | {k: v for k, v in thing.items()} | decoder[0] | _sizes(thing, names)
    for thing in pictures + sounds:
        for beside in decoder:
            yield thing | beside | _sizes(thing, names)
    if words and not (required - {"input_ids"} and main != "input_ids"):
        for beside in decoder:
            yield text | beside
            yield {"input_ids": text["input_ids"]} | beside


def _sizes(thing, names):
    value = next((v for k, v in thing.items() if k.startswith("pixel")), None)
    if value is not None and "image_sizes" in names:
        return {"image_sizes": torch.tensor([list(value.shape[-2:])] * BATCH)}
    return {}


MISMATCH = re.compile(r"tokens:? ?\(?(\d+)\)?.*features:? ?\(?(\d+)", re.DOTALL)


def accepted(model, task):
    """An input that the model takes, and its output. Raises NotBuiltError with the first complaint."""
    first = None
    for inputs in candidates(model, task):
        for _ in range(2):
            try:
                return inputs, run(model, inputs)
            except Exception as error:
                if VERBOSE:
                    print({k: list(v.shape) for k, v in inputs.items()}, line(error), _where(error))
                first = first or error
                again = _with_places(model.config, inputs, str(error))
                if again is None:
                    break
                inputs = again
    raise NotBuiltError(f"no input found: {line(first)}")


def _with_places(config, inputs, text):
    """The inputs with as many places for images (or sounds) in the text as the error asks for."""
    match = MISMATCH.search(text)
    if match is None or "input_ids" not in inputs:
        return None
    each = -(-int(match[2]) // BATCH)
    each = each // look(config, "hidden_size") if each > 500 else each
    kind = "audio" if "udio" in text else "image"
    place = look(config, f"{kind}_token_id", f"{kind}_token_index", f"{kind}_placeholder_id")
    if place is None or each > 600:
        return None
    ids = inputs["input_ids"]
    ids = torch.cat([ids[:, :2], torch.full((BATCH, each), place), ids[:, 2:]], 1)
    new = inputs | {"input_ids": ids}
    if "attention_mask" in inputs:
        new["attention_mask"] = torch.ones_like(ids)
    if "mm_token_type_ids" in inputs:
        new["mm_token_type_ids"] = (ids == place).long()
    return new


def run(model, inputs, seed=3):
    """Outputs of a forward, the random generator at `seed`."""
    torch.manual_seed(seed)
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return model(**inputs, **options)


SKIPPED = ("past_key_values", "loss", "hidden_states", "attentions", "cache", "decoder_hidden_states", "attention")


def tensors(output):
    """Every floating-point tensor of an output, caches, losses and intermediate states apart."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        kept = [v for k, v in output.items() if not any(k.endswith(skip) for skip in SKIPPED) or k == "last_hidden_state"]
        return [t for value in kept for t in tensors(value)]
    if isinstance(output, list | tuple):
        return [t for value in output for t in tensors(value)]
    return []


def _where(error):
    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in reversed(frames[-3:]))


def line(error):
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


# ---------------------------------------------------------------------------------------------- models

LIMIT = 4_000_000  # values; a model that is larger was not shrunk


def build(pair, sizes):
    """A tiny shaken model in eval mode."""
    config = configure(pair.type, pair.task, sizes)
    cls = getattr(T, pair.cls)
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if count > LIMIT:
        raise NotBuiltError(f"not shrunk: {count:,} values")
    torch.manual_seed(0)
    model = cls(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def tiny(pair):
    """Model, inputs and outputs of a pair. Raises NotBuiltError with the reason."""
    first = None
    for sizes in SIZES:
        try:
            model = build(pair, sizes)
            inputs, output = accepted(model, pair.task)
            if not tensors(output):
                raise NotBuiltError("its output holds no tensor")
            if not all(torch.isfinite(t).all() for t in tensors(output)):
                raise NotBuiltError("its output is not finite")
            return model, inputs, output
        except Exception as error:
            first = first or error
    raise first if isinstance(first, NotBuiltError) else NotBuiltError(line(first))
