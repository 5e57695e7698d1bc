"""What the checkpoint lacked: tensors that are drawn anew in every process, so that no delta may count on them.

`from_pretrained` marks each parameter that it read, to keep it from being initialised; one without the mark beside
others that bear it is new. `smidgen.load` notes the names as well, because a copy of a model loses the marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from smidgen.sites.roles import within

MARK = "_is_hf_initialized"


def note_new(model: nn.Module, missing: set[str]) -> None:
    """Remember which parameters the checkpoint lacked (names), and how many tokens it knew."""
    model._smidgen_new = tuple(n for n, _ in model.named_parameters() if n in missing)  # type: ignore[assignment]
    model._smidgen_tokens = _tokens(getattr(model, "config", None))  # type: ignore[assignment]


def is_noted(model: nn.Module) -> bool:
    """Whether `smidgen.load` made the model."""
    return "_smidgen_tokens" in vars(model)


def keep_note(model: nn.Module, twin: nn.Module) -> nn.Module:
    """A copy of a model, told what the model knows of its checkpoint."""
    new = new_names(model)
    if new is not None:
        twin._smidgen_new = new  # type: ignore[assignment]
    return twin


def new_names(model: nn.Module) -> tuple[str, ...] | None:
    """Names of the parameters that no checkpoint held, in the model's order; None if none was read at all."""
    record: Any = vars(model).get("_smidgen")
    if record is not None:  # masters bear no marks
        found: tuple[str, ...] | None = record.new
        return found
    parameters = dict(model.named_parameters())
    noted = {path: set(vars(m)["_smidgen_new"]) for path, m in model.named_modules() if "_smidgen_new" in vars(m)}
    if not noted and not any(getattr(p, MARK, False) for p in parameters.values()):
        return None
    unread = {name for name, p in parameters.items() if not getattr(p, MARK, False)} - _made_up(model, parameters)
    for path, new in reversed(noted.items()):  # the outermost note counts
        start = f"{path}." if path else ""
        unread = {n for n in unread if not within(n, path)} | {start + n for n in new if start + n in parameters}
    return tuple(name for name in parameters if name in unread)


def _made_up(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Names of parameters that a class never saves, such as sinusoidal positions: the same in every process."""
    found = set()
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and (patterns := module._keys_to_ignore_on_load_missing):
            start = f"{path}." if path else ""
            inside = (name for name in names if name.startswith(start))
            found |= {n for n in inside if any(re.search(pattern, n[len(start) :]) for pattern in patterns)}
    return found


def resized(model: nn.Module) -> tuple[str, ...]:
    """Names of token embeddings (and output layers) with rows that were added after the checkpoint was read."""
    found: list[str] = []
    for path, module in models_in(model).items():
        start = f"{path}." if path else ""
        found += (start + name for name in _resized(module))
    return tuple(found)


def _resized(model: PreTrainedModel) -> list[str]:
    new, now = new_names(model), _tokens(model.config)
    before = getattr(model, "_smidgen_tokens", None) or _tokens_read(model.config)
    if new is None or now is None or before is None or now <= before:
        return []
    tables = [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]
    owned = {id(p) for table in tables for p in table.parameters() if p.shape[0] == now}
    return [name for name, p in model.named_parameters() if id(p) in owned and name not in new]


def models_in(model: nn.Module) -> dict[str, PreTrainedModel]:
    """Path -> each outermost model of transformers in a module, which may be the module itself ("")."""
    found: dict[str, PreTrainedModel] = {}
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(within(path, outer) for outer in found):
            found[path] = module
    return found


def _tokens(config: PreTrainedConfig | None) -> int | None:
    if config is None:
        return None
    count = getattr(config.get_text_config(), "vocab_size", None)
    return count if isinstance(count, int) else None


def _tokens_read(config: PreTrainedConfig) -> int | None:
    """Tokens that the checkpoint knew, by its configuration in a folder or in the hub's cache; None if not found."""
    name = str(getattr(config, "_name_or_path", "") or "")
    try:
        path = Path(name) / CONFIG_NAME if Path(name).is_dir() else try_to_load_from_cache(name, CONFIG_NAME)
        if not name or not isinstance(path, str | Path):
            return None
        return _tokens(type(config).from_dict(json.loads(Path(path).read_text())))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # no such repository, or a file of another form: nothing is known
