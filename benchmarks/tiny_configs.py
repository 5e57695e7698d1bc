"""The configuration of a model type, shrunk by the names of its fields; what a type needs beyond that is in TYPES."""

import copy
import dataclasses
import re
from dataclasses import dataclass

import transformers as T
from transformers.models.auto import configuration_auto

LABELS = 7
WORDS = 96  # size of every vocabulary
CLASSIFIED = ("sequence", "token", "image", "video", "audio")


@dataclass(frozen=True)
class Sizes:
    """What a shrunk configuration has everywhere."""

    width: int = 32
    heads: int = 4
    inner: int = 64
    image: int = 32
    patch: int = 8
    positions: int = 64
    rebuilt: bool = False  # made again from its fields, so that what follows from them follows from the small ones

    @property
    def head(self):
        return self.width // self.heads


WIDE = {"width": 64, "inner": 128}
SIZES = (Sizes(), Sizes(rebuilt=True), Sizes(image=64), Sizes(**WIDE), Sizes(**WIDE, image=64, rebuilt=True))


def scaled(value):
    """A width of a stage: equal widths stay equal, doubled ones doubled, and each is a multiple of 8."""
    return value if value <= 4 else 8 * max(1, round(value / 48)) if value % 3 == 0 else 8 * max(1, round(value / 64))


def up_to(number):
    return lambda sizes, value: min(value, number)


def size(name, least=0):
    return lambda sizes, value: getattr(sizes, name) if value > least else value


def cap(name):
    return lambda sizes, value: min(value, getattr(sizes, name))


KV = re.compile(r"(.*_)?(num_)?(kv_heads|key_value_heads|kv_heads|query_groups|attention_groups).*")
# first pattern that matches the whole name of a field -> what it becomes, from (sizes, value)
RULES = [
    (r".*vocab_size(_.*)?|num_embeddings", up_to(WORDS)),
    (r".*codebook_size", up_to(64)),
    (r".*(num_codebooks|num_quantizers)", up_to(2)),
    (KV.pattern, None),  # by the number of heads: see _one
    (
        r"(.*_)?(head_dim|headdim|d_kv|attention_head_size|head_size|dim_head|kv_channels|d_head|head_width)",
        size("head"),
    ),
    (r"(.*_)?(num_|n_)?(attention_|attn_)?(heads?|head_num)|nhead", size("heads", 1)),
    (r"qk_head_dim", lambda sizes, value: 2 * sizes.head),
    (r"rotary_dim", cap("head")),
    (
        r"(.*_)?(intermediate_size(_mlp)?|ffn_dim|d_ff|d_inner|ffn_hidden_size|inner_dim|mlp_dim|n_inner|ff_dim)",
        size("inner"),
    ),
    (r"(.*_)?(feedforward_dim|dim_feedforward|feed_forward_size|linear_units|feed_forward_hidden_size)", size("inner")),
    (r"(.*_)?(mlp_hidden_size|mlp_hidden_dim|ff_size|mlp_size|mlp_channels|d_ffn|linear_dim)", size("inner")),
    (r".*(lora|low)_?(rank|dim).*|.*_rank", up_to(16)),
    (r"(num_|n_)?(hidden_layers|layers?|encoder_layers|decoder_layers|blocks?)|depth", up_to(2)),
    (r".*(num_layers|n_layers?|_layers|_depth|num_blocks)|num_hidden_groups", up_to(2)),
    (r".*(position_embeddings|n_positions|max_positions?|max_source_positions|max_target_positions)", cap("positions")),
    (r".*(max_seq_len|max_sequence_length|max_seq_length|n_ctx|seq_length)", cap("positions")),
    (r".*(experts_per_tok(en)?|topk|top_k|moe_k|num_selected_experts|n_activated_experts)", up_to(2)),
    (r".*shared_experts|n_group|topk_group|num_expert_group|n_groups", up_to(1)),
    (r".*(experts|num_experts_.*)", up_to(4)),
    (r"(.*_)?(state_size|d_state|mamba_state_dim)", up_to(8)),
    (r"(.*_)?chunk_size.*", up_to(8)),
    (r"(sliding_window|.*attention_window|local_attention|local_window_size|attention_window_size)", up_to(8)),
    (r".*window_size", lambda sizes, value: 4 * sizes.patch if value >= 64 else min(value, 2)),  # in pixels, or patches
    (r"(.*_)?(image_size|img_size|input_size|crop_size)", cap("image")),
    (r"(.*_)?(patch_size|patch_size_.*)", size("patch", 7)),
    (r"(.*_)?(num_mel_bins|num_mels|n_mels|mel_bins)", up_to(16)),
    (r"(.*_)?(num_queries|num_query_tokens|query_num|n_queries|n_latents|num_latents)", up_to(4)),
    (r"(.*_)?(num_frames|frames|tubelet_frames|frames_per_clip)", up_to(4)),
    (r"num_conv_pos_embeddings", up_to(8)),
    (r"n_window(_infer)?", lambda sizes, value: 16 if value < 100 else 32),
    (r".*(_groups|num_groups)", up_to(4)),
    (r"(.*_)?(base_channels|num_filters|n_filters)", up_to(8)),
    (r"codevector_dim|proj_codevector_dim|xvector_output_dim|classifier_proj_size|feature_size", size("width")),
    (
        r".*(hidden_size|d_model|n_embd|embedding_size|hidden_channels|width|attention_size|lru_width)",
        size("width", 15),
    ),
    (r".*(proj_size|hidden_width|latents)|dim|d_embed|.*_dim|upsample_initial_channel", size("width", 15)),
]
RULES = [(re.compile(pattern), rule) for pattern, rule in RULES]
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers", "depth", "decoder_layers")
TOKENS = {"pad": 0, "bos": 1, "eos": 2, "sep": 3, "cls": 4, "mask": 5, "unk": 6, "decoder_start": 1}
ID = re.compile(r".*(token_id|token_index|token_ids|_id|_token)s?")
DROPS = re.compile(r".*(drop|mask_time_prob|mask_feature_prob|mask_prob|spec_augment|jitter).*")
STAGES = re.compile(r".*(sizes|dims?|channels|channels_list|widths|d_models?|dim_list)")
COUNTS = re.compile(r"(.*_)?(depths|layers|stage_blocks|num_blocks|block_repeats|num_hidden_layers|depth)")
# what a model cannot do without, where the default is None
NONES = {
    "head_dim": lambda config, sizes: sizes.head,
    "num_key_value_heads": lambda config, sizes: sizes.heads,
    "num_experts_per_tok": lambda config, sizes: 2,
    "vocab_size": lambda config, sizes: WORDS,
    "pad_token_id": lambda config, sizes: 0,
    "image_token_index": lambda config, sizes: 90,
    "image_token_id": lambda config, sizes: 90,
    "audio_token_id": lambda config, sizes: 89,
    "n_routed_experts": lambda config, sizes: 4,
    "n_shared_experts": lambda config, sizes: 1,
    "context_length": lambda config, sizes: 8,
    "prediction_length": lambda config, sizes: 4,
}


def configure(kind, task, sizes):
    """The shrunk configuration of a type."""
    config = prepared(configuration_auto.CONFIG_MAPPING[kind](), sizes)
    if task in CLASSIFIED:
        for part in parts(config):
            part.num_labels = LABELS
    return config


def prepared(config, sizes):
    """A configuration, shrunk and adjusted."""
    shrink(config, sizes)
    config = remade(config) if sizes.rebuilt else config
    return adjust(config, sizes)


def remade(config):
    """Made again from its fields, inner configurations first."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init and hasattr(config, f.name)}
    values = {k: remade(v) if isinstance(v, T.PreTrainedConfig) else v for k, v in values.items()}
    values = {k: int(v) if isinstance(v, Fixed) else v for k, v in values.items()}
    return type(config)(**values)


def shrink(config, sizes, ids=None):
    """Shrink in place, with dropout at 0 and special tokens inside the vocabulary."""
    ids = {} if ids is None else ids
    _layers(config)
    names = ("num_attention_heads", "n_head", "num_heads")
    heads = next((vars(config)[n] for n in names if n in vars(config)), None)
    for name, value in list(vars(config).items()):
        if isinstance(value, T.PreTrainedConfig):
            shrink(value, sizes, ids)
            continue
        new = _shrunk(name, value, sizes, heads, ids)
        if new is not value and new != value:
            object.__setattr__(config, name, new)
    return config


def _shrunk(name, value, sizes, heads, ids):
    if value is None:
        return NONES[name](None, sizes) if name in NONES else None
    if isinstance(value, bool | float) and DROPS.fullmatch(name):
        return type(value)(0)
    if ID.fullmatch(name) and not name.startswith(("num", "max")):
        return _token(name, value, ids)
    if isinstance(value, dict):
        return _mapping(value, sizes)
    if isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
        return type(value)(_several(name, value, sizes))
    return _one(name, value, sizes, heads) if type(value) is int else value


def _one(name, value, sizes, heads):
    for pattern, rule in RULES:
        if pattern.fullmatch(name):
            if rule is not None:
                return rule(sizes, value)
            return value if value == 1 else sizes.heads if heads in (None, value) else sizes.heads // 2
    return value


def _several(name, values, sizes):
    if COUNTS.fullmatch(name) and max(values) < 100:
        return [1] * len(values)
    if STAGES.fullmatch(name) and max(values) >= 16 and "image" not in name and "window" not in name:
        return [scaled(value) for value in values]
    if name.startswith("deepstack"):  # numbers of layers
        return [0, 1][: len(values)]
    if re.fullmatch(r".*heads(_list)?", name):
        return [max(1, round(v / min(values))) if min(values) else v for v in values]
    return [_one(name, value, sizes, None) for value in values]


def _token(name, value, ids):
    if isinstance(value, list | tuple):
        return [_token(name, value[0], ids)] if value and type(value[0]) is int else value
    if type(value) is not int or value < 0:
        return value
    if name.removesuffix("_token_id") in TOKENS:
        return TOKENS[name.removesuffix("_token_id")]
    return ids.setdefault(name, WORDS - 2 - len(ids))


def _mapping(values, sizes):
    new = copy.deepcopy(values)
    turned = int(sizes.head * (values.get("partial_rotary_factor") or 1)) // 2
    for key, inner in values.items():
        if isinstance(inner, dict):
            new[key] = _mapping(inner, sizes)
        elif str(key).endswith("section") and isinstance(inner, list | tuple):
            new[key] = _split(turned, len(inner))
        elif key in ("long_factor", "short_factor"):
            new[key] = inner[: max(1, turned)]
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
    if not all(isinstance(v, str | int | bool | None) for row in kinds for v in row):
        kinds = []
    firsts = sorted(kinds.index(kind) for kind in dict.fromkeys(kinds))[:4]
    rest = [i for i in range(number) if i not in firsts]
    kept = sorted(firsts + rest[: max(0, 2 - len(firsts))]) or list(range(min(2, number)))
    for key, values in lists.items():
        object.__setattr__(config, key, type(values)(values[i] for i in kept))
    if len(kept) > 2:
        object.__setattr__(config, name, Fixed(len(kept)))


class Fixed(int):
    """A whole number that no rule changes: its type is not int."""


def adjust(config, sizes):
    """What a type needs beyond the rules, in place."""
    for value in vars(config).values():
        if isinstance(value, T.PreTrainedConfig):
            adjust(value, sizes)
    rope = getattr(config, "rope_parameters", None)
    if "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()) and isinstance(rope, dict):
        turned = int(sizes.head * (rope.get("partial_rotary_factor") or 1)) // 2
        rope.setdefault("mrope_section", _split(turned, 3))
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = TOKENS["decoder_start"]
    for name, value in TYPES.get(config.model_type, {}).items():
        path, _, last = name.rpartition(".")
        owner = getattr(config, path) if path else config
        object.__setattr__(owner, last, value(config, sizes) if callable(value) else value)
    for name, value in list(vars(config).items()):
        if isinstance(value, Fixed):
            object.__setattr__(config, name, int(value))
    return config


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


def _mamba_heads(config, sizes):
    """So many heads of `head` channels make twice the width."""
    return 2 * sizes.width // sizes.head


def _head(config, sizes):
    return sizes.head


GRID = [[32, 64], [64, 32], [64, 64]]
TYPES = {
    "aria": {"projector_patch_to_query_dict": {16: 4}, "max_value_projector_patch_to_query_dict": 4},
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "llava_next": {"image_grid_pinpoints": GRID},
    "llava_next_video": {"image_grid_pinpoints": GRID},
    "llava_onevision": {"image_grid_pinpoints": GRID},
    "bamba": {"mamba_n_heads": _mamba_heads},
    "chameleon": {"vocabulary_map": {f"IMGIMG{chr(65 + i)}Z": 8 + i for i in range(26)} | {"<image>": 40}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cvt": {"depth": [1, 2, 3], "embed_dim": [8, 24, 48]},  # its rate of dropped paths is read at the stage's number
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "falcon_h1": {"mamba_n_heads": _mamba_heads, "mamba_d_ssm": lambda c, s: 2 * s.width},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": {"mamba_n_heads": _mamba_heads, "layer_types": ["linear_attention", "full_attention"]},
    "instructblipvideo": {"video_token_index": 90},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": _mamba_heads},
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32, "embedding_size": 32},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "pix2struct_vision_model": {"patch_embed_hidden_size": 192},
    "reformer": {"axial_pos_embds": False, "attention_head_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "attention_head_dim": lambda c, s: 2 * s.head,
        "attention_hidden_size": lambda c, s: 2 * s.width,
    },
    "zamba2": {"n_mamba_heads": _mamba_heads, "mamba_headdim": _head},
}
