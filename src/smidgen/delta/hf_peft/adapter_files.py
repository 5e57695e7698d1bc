"""The files of a Hugging Face PEFT adapter: adapter_config.json and adapter_model.safetensors.

Only the format is known here, the package itself is never imported. Whatever in a config would change
what the tensors mean is refused by name, so that a newer field cannot pass unnoticed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from smidgen.common.atomic_files import read_json, write_files
from smidgen.common.errors import DeltaError, nearest

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
PROMPT = "prompt_embeddings"  # one tensor without a prefix; PEFT wraps the model once less around these
MARKS = {
    "LN_TUNING": ".ln_tuning_layers.",
    "LORA": ".lora_",
    "IA3": ".ia3_",
    "PREFIX_TUNING": PROMPT,
    "PROMPT_TUNING": PROMPT,
}

# Fields that say where an adapter sits or came from; the tensors' own names carry that too.
_PLACES = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "modules_to_save", "runtime_config"),
}
_PROMPTS = {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
_KNOWN = {
    "LN_TUNING": _PLACES,
    # a prefix is saved as its network gives it, and how either began is past
    "PREFIX_TUNING": _PLACES | _PROMPTS | {"encoder_hidden_size", "prefix_projection", "init_weights"},
    "PROMPT_TUNING": _PLACES
    | _PROMPTS
    | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"},
    "IA3": _PLACES | {"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"},
    "LORA": _PLACES
    | {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"}
    | {"layers_to_transform", "layers_pattern", "init_lora_weights", "bias"}
    | {"megatron_core", "qalora_group_size", "eva_config"},  # without effect on the trained tensors
}
# Starts that leave the base as it was, and the one other that is a function of it; the rest (pissa_niter_..., olora,
# corda, loftq) take out of its weights what the file does not tell.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "pissa")


class AdapterConfig(TypedDict, total=False):
    """Fields of adapter_config.json that are read here."""

    peft_type: str
    task_type: str | None
    target_modules: list[str] | str | None
    modules_to_save: list[str] | None
    r: int
    lora_alpha: float
    lora_dropout: float
    alpha_pattern: dict[str, float] | None
    use_rslora: bool
    use_dora: bool
    init_lora_weights: bool | str | None
    bias: str
    num_virtual_tokens: int
    num_transformer_submodules: int | None


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter's two files say; names of tensors come without PEFT's prefix."""

    source: str
    kind: str
    config: AdapterConfig
    tensors: Mapping[str, Tensor]

    @property
    def added(self) -> dict[str, Tensor]:
        """The tensors of the method itself."""
        return {name: t for name, t in self.tensors.items() if MARKS[self.kind] in name}

    @property
    def saved(self) -> dict[str, Tensor]:
        """Whole modules that were stored beside the method: a head, as a rule."""
        mark = MARKS[self.kind]
        return {n.replace(".base_layer.", "."): t for n, t in self.tensors.items() if mark not in n}


def read_adapter(source: str | os.PathLike[str]) -> AdapterFile:
    """Read a folder, or a hub id.

    Raises:
        DeltaError: no such adapter, weights in a pickle, an unknown peft_type, or a config field that would
            change what the tensors mean.
    """
    folder = _folder(source)
    config = cast(AdapterConfig, read_json(folder / CONFIG))
    kind = config.get("peft_type")
    if kind not in MARKS:
        raise DeltaError(f"{folder / CONFIG}: peft_type {kind!r} cannot be read; {', '.join(MARKS)} can")
    _check_fields(folder / CONFIG, kind, config)
    tensors = _tensors(folder / TENSORS, _prefix(kind))
    adapter = AdapterFile(os.fspath(source), kind, config, tensors)
    if not adapter.added:
        raise DeltaError(f"{folder / TENSORS} holds no tensor of a {kind} adapter (found: {first_names(tensors)})")
    return adapter


def write_adapter(folder: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Path:
    """Write both files of an adapter, each whole or not at all; names of tensors come without PEFT's prefix.

    Raises:
        DeltaError: the folder cannot be written.
    """
    prefix = _prefix(str(config["peft_type"]))
    names = {name: name if name == PROMPT else prefix + name for name in sorted(tensors)}
    data = {names[name]: tensors[name].detach().cpu().contiguous() for name in names}
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    return write_files(folder, {TENSORS: save(data, metadata={"format": "pt"}), CONFIG: text})


def check_complete(adapter: AdapterFile, found: Iterable[str], modules: Iterable[str]) -> None:
    """Refuse a file that lacks tensors for a module that its `target_modules` list names.

    Patterns in a config are a stranger's regular expressions and are not run: then the tensors alone decide.

    Raises:
        DeltaError: naming the modules.
    """
    targets, config = adapter.config.get("target_modules"), adapter.config
    narrowed = [config.get(f) for f in ("layers_to_transform", "layers_pattern", "exclude_modules")]
    if not isinstance(targets, list) or any(value not in (None, [], "") for value in narrowed):
        return
    saved = tuple(config.get("modules_to_save") or ())
    wanted = {m for m in modules if _listed(m, targets) and not any(part in saved for part in m.split("."))}
    missing = sorted(wanted - set(found))
    if missing:
        raise DeltaError(
            f"{adapter.source}: target_modules names {first_names(missing)}, but the file has no tensors for it"
        )


def _listed(module: str, targets: Iterable[str]) -> bool:
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _check_fields(path: Path, kind: str, config: AdapterConfig) -> None:
    """Refuse fields of a PEFT configuration that have no counterpart here, and starts that change the base."""
    for field, value in config.items():
        if value and field not in _KNOWN[kind]:
            raise DeltaError(f"{path}: {field}={value!r} has no counterpart here, so the adapter cannot be read")
    if kind != "LORA":
        return
    if config.get("bias", "none") != "none":
        raise DeltaError(f"{path}: bias={config['bias']!r} trains biases beside LoRA; only bias='none' can be read")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise DeltaError(
            f"{path}: init_lora_weights={start!r} changes the base's own weights by what the file does not hold; save "
            "it in PEFT as a plain LoRA (path_initial_model_for_weight_conversion) first"
        )
    for field in ("r", "lora_alpha"):
        value = config.get(field)
        if not isinstance(value, int | float) or value <= 0:
            raise DeltaError(f"{path}: {field}={value!r} is not a number above 0")


def _prefix(kind: str) -> str:
    return PREFIX.removesuffix("model.") if MARKS[kind] == PROMPT else PREFIX


def _tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """An adapter's tensors by name, without PEFT's prefix."""
    if not path.is_file():
        raise DeltaError(f"{path} is missing; an adapter_model.bin is a pickle, which can run code, and is not read")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise DeltaError(f"{path} is corrupt or truncated ({error})") from None
    for name, tensor in tensors.items():
        if not name.startswith(prefix) and name != PROMPT:
            raise DeltaError(f"{path}: {name} does not start with {prefix!r} as PEFT's own files do")
        if not tensor.is_floating_point():
            raise DeltaError(f"{path}: {name} is {str(tensor.dtype)[6:]}; only floating-point tensors can be read")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _folder(source: str | os.PathLike[str]) -> Path:
    """An adapter's folder, on the disk or downloaded from the hub."""
    folder, text = Path(source), os.fspath(source)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            files = [p.name for p in folder.iterdir()]
            raise DeltaError(f"{folder} holds no PEFT adapter: {CONFIG} is missing (found: {first_names(files)})")
        return folder
    if folder.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        near = nearest(folder.name, (p.name for p in folder.parent.iterdir())) if folder.parent.is_dir() else ""
        raise DeltaError(f"no PEFT adapter at {text}: not a folder{near}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=[CONFIG, TENSORS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DeltaError(f"{text} is neither a folder nor an adapter on the hub ({type(error).__name__})") from None


def first_names(names: Iterable[str], most: int = 3) -> str:
    """The first few names in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return (", ".join(ordered[:most]) or "nothing") + more


def task_type(model: nn.Module) -> str | None:
    """PEFT's name for what the model's class does, None where it has none."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if name.endswith("ForConditionalGeneration") and getattr(config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    kinds = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    return next((kind for ending, kind in kinds.items() if name.endswith(ending)), None)
