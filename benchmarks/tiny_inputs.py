"""An input that a tiny model accepts, guessed from its forward's arguments and its configuration, and its outputs."""

import inspect
import os
import re
import traceback

import torch
from tiny_configs import WORDS, look

VERBOSE = bool(os.environ.get("TINY_VERBOSE"))


class NotBuiltError(Exception):
    """transformers itself does not run here; the reason in one line."""


BATCH, LENGTH, SIDE = 2, 8, 4  # images in patches have SIDE x SIDE of them


def _floats(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def _ids(config, length=LENGTH):
    words = min(WORDS - 24, look(config, "vocab_size", default=WORDS))
    return torch.randint(min(8, words - 1), words, (BATCH, length), generator=torch.Generator().manual_seed(6))


def _square(value):
    return tuple(value)[-2:] if isinstance(value, list | tuple) else (value, value)


def _channels(config):
    value = look(config, "num_channels", "in_channels", "in_chans", default=3)
    return value if type(value) is int else 3


def _images(config, name):
    """One image each, several of each, frames, patches in a row."""
    sides = _square(look(config, "image_size", "img_size", "input_size", default=32))
    channels, patch = _channels(config), _square(look(config, "patch_size", default=8))
    frames = look(config, "num_frames", "frames_per_clip", default=2)
    yield {name: _floats(BATCH, channels, *sides)}
    if name == "pixel_values_videos":
        yield {name: _floats(BATCH, frames, channels, *sides)}
    yield {name: _floats(BATCH, 1, channels, *sides)}
    yield {name: _floats(BATCH, frames, channels, *sides)}
    yield {name: _floats(BATCH, SIDE * SIDE, channels * patch[0] * patch[1])}
    yield {name: _floats(BATCH, 3, channels, *sides)}
    if tiles := look(config, "max_num_tiles"):
        yield {name: _floats(BATCH, 1, tiles, channels, *sides)}
    if sides != (64, 64):
        yield {name: _floats(BATCH, channels, 64, 64)}


def _patches(config, name, grid):
    """Patches in a row, with the grid that they came from."""
    channels, patch = _channels(config), _square(look(config, "patch_size", default=8))
    times = look(config, "temporal_patch_size", default=1)
    times = times if type(times) is int else times[0]
    count = torch.tensor([[1, SIDE, SIDE]] * BATCH)
    count = count if "thw" in grid else count[:, 1:]
    rows = [(channels * t * patch[0] * patch[1],) for t in dict.fromkeys((times, 1))] + [(channels, *patch)]
    for row in rows:
        yield {name: _floats(SIDE * SIDE * BATCH, *row), grid: count}
    yield {name: _floats(BATCH, SIDE * SIDE, *rows[-2]), grid: count}
    yield {name: _floats(SIDE * SIDE * BATCH, look(config, "hidden_size", default=32)), grid: count}


def _sounds(config, name):
    """Raw samples, or features: (batch, bins, time) and (batch, time, bins)."""
    bins = look(config, "num_mel_bins", "n_mels", "input_feat_per_channel", "input_dim", "feature_size", default=16)
    times = 2 * look(config, "max_source_positions", "n_ctx", default=32)
    if name == "input_values":
        yield {name: _floats(BATCH, 4000)}
        yield {name: _floats(BATCH, 1, 4000)}
        yield {name: _floats(BATCH, 1, 3840)}
        yield {name: _floats(BATCH, look(config, "max_length", default=64), bins)}
        return
    yield {name: _floats(BATCH, bins, times)}
    yield {name: _floats(BATCH, times, bins)}
    yield {name: _floats(BATCH, 64, bins)}
    yield {name: _floats(BATCH, bins, 64)}
    yield {name: _floats(BATCH, 1, 64, bins)}


def _series(config, name):
    """Numbers over time, for forecasts."""
    length = look(config, "context_length", default=16)
    lags = max(look(config, "lags_sequence", default=[0]) or [0])
    channels = look(config, "num_input_channels", default=1)
    features = look(config, "num_time_features", default=0)
    yield {name: _floats(BATCH, length, channels)}
    yield {name: _floats(BATCH, length)}
    yield {
        name: _floats(BATCH, length + lags),
        "past_time_features": _floats(BATCH, length + lags, features),
        "past_observed_mask": torch.ones(BATCH, length + lags),
        "future_values": _floats(BATCH, 4),
        "future_time_features": _floats(BATCH, 4, features),
    }


def _image_places(config, given):
    """True where Kosmos-2 puts what it sees."""
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    mask[:, 1 : 1 + look(config, "latent_query_num")] = True
    return mask


# argument -> what it is given when nothing better is known, from (configuration, what is given already)
BESIDE = {
    "bbox": lambda c, given: torch.tensor([1, 2, 5, 7]).expand(BATCH, LENGTH, 4).contiguous(),
    "mm_token_type_ids": lambda c, given: torch.zeros(BATCH, LENGTH, dtype=torch.long),
    "image_sizes": lambda c, given: torch.tensor([list(_pixels_of(given).shape[-2:])] * BATCH),
    "qformer_input_ids": lambda c, given: _ids(c),
    "input_features_mask": lambda c, given: torch.ones(BATCH, given["input_features"].shape[-1], dtype=torch.long),
    "feature_attention_mask": lambda c, given: torch.ones(BATCH, given["input_features"].shape[-1], dtype=torch.long),
    "aspect_ratio_ids": lambda c, given: torch.ones(BATCH, 1, dtype=torch.long),
    "aspect_ratio_mask": lambda c, given: torch.ones(BATCH, 1, look(c, "max_num_tiles"), dtype=torch.long),
    "cross_attention_mask": lambda c, given: torch.ones(BATCH, LENGTH, 1, look(c, "max_num_tiles"), dtype=torch.long),
    "audio_mel_mask": lambda c, given: torch.zeros(BATCH, given["audio_mel"].shape[1], dtype=torch.bool),
    "merge_sizes": lambda c, given: torch.ones(BATCH, dtype=torch.long),
    "pixel_attention_mask": lambda c, given: torch.ones(BATCH, SIDE * SIDE, dtype=torch.long),
    "past_values_padding": lambda c, given: torch.zeros(given["past_values"].shape),
    "freq": lambda c, given: torch.zeros(BATCH, 1, dtype=torch.long),
    "query_embeds": lambda c, given: _floats(BATCH, LENGTH, look(c, "hidden_size")),
    "encoder_hidden_states": lambda c, given: _floats(BATCH, 5, look(c, "encoder_hidden_size", "hidden_size")),
    "prompt_pixel_values": lambda c, given: given["pixel_values"],
    "prompt_masks": lambda c, given: given["pixel_values"],
    "visual_feats": lambda c, given: _floats(BATCH, 4, look(c, "visual_feat_dim")),
    "visual_pos": lambda c, given: torch.rand(BATCH, 4, 4),
    "task_inputs": lambda c, given: _ids(c),
    "pixel_position_ids": lambda c, given: _places(),
    "state": lambda c, given: _floats(BATCH, look(c, "max_state_dim", default=8)),
    "actions": lambda c, given: _floats(BATCH, 5, look(c, "act_dim", "max_action_dim", default=8)),
    "states": lambda c, given: _floats(BATCH, 5, look(c, "state_dim")),
    "rewards": lambda c, given: _floats(BATCH, 5, 1),
    "returns_to_go": lambda c, given: _floats(BATCH, 5, 1),
    "timesteps": lambda c, given: torch.arange(5).repeat(BATCH, 1),
    "image_embeds_position_mask": _image_places,
    "flattened_patches": lambda c, given: torch.cat([1.0 + _places(), _floats(BATCH, SIDE * SIDE, 3 * 8 * 8)], -1),
    "noise_embeds": lambda c, given: _floats(BATCH, LENGTH, look(c, "hidden_size")),
    "context_hidden_states": lambda c, given: _floats(BATCH, LENGTH, look(c, "hidden_size")),
}
# given although the forward does not ask for them
ALWAYS = ("bbox", "mm_token_type_ids", "visual_feats", "visual_pos", "image_embeds_position_mask")
# given at the second try
SIZED = (
    "image_sizes",
    "pixel_attention_mask",
    "input_features_mask",
    "feature_attention_mask",
    "aspect_ratio_ids",
    "aspect_ratio_mask",
    "cross_attention_mask",
)


def _pixels_of(given):
    return next(v for k, v in given.items() if k.startswith("pixel"))


def _places():
    row = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"), -1).reshape(1, -1, 2)
    return row.repeat(BATCH, 1, 1)


def _things(config, names):
    """What is seen and heard, in every layout that the arguments allow."""
    sees = next((n for n in names if n.startswith("pixel_values")), None)
    grid = next((n for n in names if re.fullmatch(r"(image_)?grid_(thw|hw)|spatial_shapes", n)), None)
    states = "hidden_states" if "hidden_states" in names and grid else None
    if (sees or states) and grid:
        yield from _patches(config, sees or states, grid)
    if sees:
        yield from _images(config, sees)
    for name, kind in SENSES.items():
        if name in names:
            yield from kind(config, name)


SENSES = {
    "input_features": _sounds,
    "input_values": _sounds,
    "audio_values": _sounds,
    "audio_mel": _sounds,
    "past_values": _series,
}


def candidates(model, task):
    """Inputs to try, likely ones first."""
    names = inspect.signature(model.forward).parameters
    config = model.config
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = [n for n, p in names.items() if p.default is p.empty and p.kind in plain]
    mains = [model.main_input_name] if isinstance(model.main_input_name, str) else model.main_input_name
    text = {}
    if "input_ids" in names:
        text["input_ids"] = _ids(config)
        if task == "sequence":  # some read the last such token
            text["input_ids"][:, -1] = look(config, "eos_token_id", default=2)
    if "attention_mask" in names and text:
        text["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.long)
    things = list(_things(config, names))
    decoders = [{"decoder_input_ids": _ids(config, 6)}, {}] if "decoder_input_ids" in names else [{}]
    decoders = decoders[::-1] if task in ("sequence", "token") else decoders
    senses = [text | thing for thing in things] if text else []
    senses += [thing for thing in things if "input_ids" not in mains or not text]
    alone = [text, {k: v for k, v in text.items() if k == "input_ids"}] if text else [{}]
    for bases, sized in ((senses, False), (senses, True), (alone, False)):
        for base in bases:
            for decoder in decoders:
                full = _filled(config, names, base | decoder, required, mains, sized)
                if full is not None:
                    yield full


def _filled(config, names, given, required, mains, sized):
    """What is given, with what else the forward needs; None if that is not known, or if nothing is new."""
    wanted = {n for n in (*required, *mains, *ALWAYS) if n in names and n not in given}
    wanted |= {n for n in SIZED if n in names and sized}
    if sized and not wanted & set(SIZED):
        return None
    full = dict(given)
    for name in sorted(wanted, key=list(names).index):
        if name not in BESIDE:
            if name in required:
                return None
            continue
        try:
            full[name] = BESIDE[name](config, full)
        except (KeyError, StopIteration, TypeError):
            if name in required:
                return None
    return full or None


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


SKIPPED = ("past_key_values", "loss", "hidden_states", "attentions", "cache")


def tensors(output):
    """Every floating-point tensor of an output, caches, losses and intermediate states apart."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        kept = [
            v for k, v in output.items() if not any(k.endswith(skip) for skip in SKIPPED) or k == "last_hidden_state"
        ]
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
