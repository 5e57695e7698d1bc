"""A run's folder: run.json (what was asked and chosen), metrics.jsonl, one checkpoint file, and at the end the delta.

The checkpoint is a single safetensors file that is replaced by a rename, so that a run killed at any moment leaves a
whole one. Starting the same run again goes on from it; metrics.jsonl is cut back to where it was then.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from smidgen.common.atomic_files import read_json, write_files
from smidgen.common.errors import RecipeError, TrainError, WriteError
from smidgen.delta.delta import META
from smidgen.delta.fingerprint import SHA256, XXH3
from smidgen.delta.saved_selection import FILE as SELECTION
from smidgen.delta.saved_selection import Selection
from smidgen.recipe.recipe import Recipe
from smidgen.training.run.progress import Choices, Progress, State, Validation

RUN, METRICS, CHECKPOINT = "run.json", "metrics.jsonl", "checkpoint.safetensors"


class RunFolder:
    """One run's folder, or nothing at all if `path` is None."""

    def __init__(self, path: str | os.PathLike[str] | None, writer: bool = True) -> None:
        self.path = None if path is None else Path(path)
        self.writer = writer and path is not None

    def open(self, asked: Mapping[str, object]) -> Choices | None:
        """What was chosen at an earlier start of the same run, or None for a new one.

        Raises:
            TrainError: the folder holds another run, or something else.
        """
        if self.path is None or not self.path.exists():
            return None
        if not self.path.is_dir():
            raise TrainError(f"{self.path} is a file, not a folder")
        if not (self.path / RUN).is_file():
            if any(not p.name.startswith(".") for p in self.path.iterdir()):
                raise TrainError(f"{self.path} is not empty and holds no run of smidgen; choose another --out")
            return None
        record = read_json(self.path / RUN)
        check_same(self.path, record["asked"], asked)
        return Choices.from_json(record["chosen"])

    def start(self, asked: Mapping[str, object], chosen: Choices) -> None:
        """Write what was asked and every automatic choice, to be used again on resuming."""
        if self.writer and self.path:
            record = {"asked": asked, "chosen": chosen.to_json()}
            content = json.dumps(record, indent=1, sort_keys=True).encode()
            write_files(self.path, {RUN: content, METRICS: b""})

    def agreed(self, asked: Mapping[str, object], chosen: Choices, earlier: Choices | None) -> Choices:
        """The choices to train by: fresh ones, written down, or those of the earlier start.

        Raises:
            TrainError: the run was begun with another number of processes.
        """
        if earlier is None:
            self.start(asked, chosen)
            return chosen
        if earlier.processes != chosen.processes:
            raise TrainError(f"{self.path} was begun with {earlier.processes} process(es), not {chosen.processes}")
        for key, then, now in (
            ("threads", earlier.threads, chosen.threads),
            ("torch", earlier.torch, chosen.torch),
        ):
            if then != now:
                warnings.warn(f"{key} was {then}, now {now}: the run goes on, but not bit for bit", stacklevel=2)
        return earlier

    def keep(self, selection: Selection | None) -> None:
        """Put down what was chosen, so that a resumed run has the same."""
        if self.writer and self.path and selection is not None:
            selection.save(self.path)

    def kept(self) -> Selection | None:
        """What an earlier start chose, if it came so far."""
        return Selection.load(self.path) if self.path and (self.path / SELECTION).is_file() else None

    @property
    def hashed_by(self) -> str:
        """The digest by which the base's content is told, as an earlier start told it."""
        return XXH3 if self.path is None else hashed_by(self.path / RUN)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: the delta is there."""
        return self.path is not None and (self.path / META).is_file()

    def log(self, entry: Mapping[str, object]) -> None:
        """Append one line to metrics.jsonl. Raises WriteError if the disk is full."""
        if self.writer and self.path:
            try:
                with open(self.path / METRICS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                raise WriteError(f"cannot write to {self.path / METRICS}: {error.strerror or error}") from None

    def history(self) -> list[Validation]:
        """The validations that metrics.jsonl tells of, in order."""
        lines = [] if self.path is None else (self.path / METRICS).read_text(encoding="utf-8").splitlines()
        return [Validation.from_json(entry) for entry in map(json.loads, lines) if "validation" in entry]

    def checkpoint(self, state: State) -> None:
        """Replace the checkpoint."""
        if self.writer and self.path:
            length = (self.path / METRICS).stat().st_size
            metadata = {"state": json.dumps({**state.progress.to_json(), "metrics_bytes": length})}
            tensors = {name: t.detach().cpu().contiguous() for name, t in state.tensors.items()}
            write_files(self.path, {CHECKPOINT: save(tensors, metadata)})

    def resume(self) -> State | None:
        """The last checkpoint, with metrics.jsonl cut back to it; None if there is none yet.

        Raises:
            TrainError: the checkpoint is damaged.
        """
        if self.path is None:
            return None
        state, length = self._read() if (self.path / CHECKPOINT).is_file() else (None, 0)
        if self.writer:
            (self.path / METRICS).touch()
            os.truncate(self.path / METRICS, length)
            for part in self.path.glob(".part-*"):  # of a write that was killed
                part.unlink(missing_ok=True)
        return state

    def _read(self) -> tuple[State, int]:
        path = Path(self.path or "", CHECKPOINT)
        try:
            with safe_open(path, framework="pt") as file:
                numbers = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                length = int(numbers.pop("metrics_bytes"))
                return State(tensors, Progress.from_json(numbers)), length
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise TrainError(f"{path} is damaged ({error}); remove it to start over") from None

    def finish(self) -> None:
        """The delta is saved; the checkpoint is not needed any more, nor what a start killed in here left of it."""
        if self.writer and self.path:
            for path in (self.path / CHECKPOINT, self.path / SELECTION, *self.path.glob("prefix-*.states")):
                if path.exists():  # a finished run may lie where nothing can be written
                    path.unlink(missing_ok=True)  # the delta has the indices too; hidden states are of no more use


def hashed_by(file: Path) -> str:
    """The digest by which a record (run.json, search.json) tells the base's content; today's if there is no record."""
    if not file.is_file():
        return XXH3
    asked = read_json(file).get("asked")
    return str(asked.get("base_hash", SHA256)) if isinstance(asked, Mapping) and "base" in asked else XXH3


def check_same(path: Path, before: Mapping[str, object], asked: Mapping[str, object]) -> None:
    """Raises TrainError, naming the first difference, if what is asked now is not what a folder was begun with."""
    for key in sorted(asked):
        if _spelled(before.get(key)) != _spelled(asked[key]):
            name, then, now = _difference(key, before.get(key), asked[key])
            what = f"{name} was {then}, now {now}"
            raise TrainError(f"{path} holds another run: {what}; choose another --out, or remove the folder")


def _difference(key: str, before: object, asked: object) -> tuple[str, str, str]:
    """What differs, and both of its values as a person reads them. Of settings, the first that differs."""
    if key == "recipe" and before is not None:
        with suppress(RecipeError):  # of an earlier version, with other fields
            then, now = (str(Recipe.from_json(cast("list[dict[str, object]]", terms))) for terms in (before, asked))
            return key, then, now
    if isinstance(before, list | tuple) and isinstance(asked, list | tuple):
        if len(before) != len(asked):
            return f"the number of {key}", str(len(before)), str(len(asked))
        before, asked = next(pair for pair in zip(before, asked, strict=True) if _spelled(pair[0]) != _spelled(pair[1]))
    if isinstance(before, Mapping) and isinstance(asked, Mapping):
        inner = next(k for k in sorted({*before, *asked}) if _spelled(before.get(k)) != _spelled(asked.get(k)))
        return f"{inner} of {key}", repr(before.get(inner)), repr(asked.get(inner))
    return key, repr(before), repr(asked)


def _spelled(value: object) -> str:
    return json.dumps(value, sort_keys=True)  # as text, 1 (a count) is not 1.0 (a share)
