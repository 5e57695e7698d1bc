"""What a process of Ray does: one trial at a time, with base and work kept for the next."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smidgen.common.errors import TrainError
from smidgen.delta.delta import Delta
from smidgen.efficiency.prefix_cache.shared_caches import Kept
from smidgen.studies.runners.packing import unpacked
from smidgen.studies.runners.returned_files import read_run
from smidgen.studies.runners.work import Work
from smidgen.studies.trial import Trial
from smidgen.training.run.settings import Settings


@dataclass(frozen=True, eq=False)
class Made:
    """What came of a trial.

    Attributes:
        delta: None if it came to none, or if it is in `files`.
        files: of its run; none if it has no folder, or came to no delta.
    """

    trial: Trial
    delta: Delta | None
    files: Mapping[str, bytes]


@dataclass(frozen=True, eq=False)
class _Work:
    """Work that trials of this process share; `scratch` is for hidden states too large for memory."""

    work: Work
    kept: Kept
    scratch: tempfile.TemporaryDirectory[str]


# What this process has got, by the name that the store has for it: the last of each. A name does not hold the store's
# own copy, as a reference would.
_bases: dict[str, nn.Module] = {}
_works: dict[tuple[str, str], _Work] = {}


def run_one(stored: tuple[Any, Any], settings: Settings, name: str | None, threads: int) -> Made:
    """A trial in a folder of its own, if `name` is one's name; `stored`: where the store has model and work."""
    torch.set_num_threads(min(threads, os.cpu_count() or 1))
    here = _taken(stored)
    if name is None:
        trial, delta = here.work.run(settings, None, False, here.kept)
        return Made(trial, delta, {})
    with tempfile.TemporaryDirectory(prefix="smidgen-", ignore_cleanup_errors=True) as folder:
        out = Path(folder) / name
        trial, delta = here.work.run(settings, out, False, here.kept)
        return Made(trial, None, {} if delta is None else read_run(out))


def _taken(stored: tuple[Any, Any]) -> _Work:
    """The work on its model, read from the store by the first trial that needs it."""
    base, _ = names = stored[0].hex(), stored[1].hex()
    if names not in _works:
        _works.clear()
        work: Work = _read(stored[1])
        if base not in _bases:
            _bases.clear()
            _bases[base] = _read(stored[0])
        scratch = tempfile.TemporaryDirectory(prefix="smidgen-", ignore_cleanup_errors=True)
        folder = None if work.folder is None else Path(scratch.name)
        work = replace(work, model=_bases[base], folder=folder)
        _works[names] = _Work(work, work.kept(), scratch)
    return _works[names]


def _read(reference: Any) -> Any:
    import ray

    try:
        return unpacked(ray.get(reference))
    except (ImportError, AttributeError) as error:
        raise TrainError(f"a process of Ray lacks what this one has: {error}; both need the same packages") from None
