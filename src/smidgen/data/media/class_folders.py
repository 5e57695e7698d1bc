"""Folders and archives of images or sounds: one folder for each class, perhaps in a folder for each split."""

from __future__ import annotations

import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath

from datasets import Dataset, Features, Value

from smidgen.common.errors import DataError
from smidgen.data.media.media_file import CELL, MediaFile
from smidgen.data.readers import FORMATS, SPLITS, Raw, split_called
from smidgen.data.splits import cut, group

TEST = 0.1  # share of every class that becomes the test split where there are no splits
Example = tuple[MediaFile, str]


@dataclass(frozen=True)
class MediaForm:
    """What a kind of media is called, which column it stands in, and how its files end."""

    column: str
    what: str
    suffixes: frozenset[str]

    def holds(self, name: str) -> bool:
        """Whether a file of that name is one."""
        return PurePosixPath(name).suffix.lower() in self.suffixes


def read_media(path: Path, form: MediaForm, seed: int) -> Raw | None:
    """Splits of a folder or a .zip of media; None if it holds none, or rows.

    The class is the folder that a file lies in, the split the folder around that (`train`, `validation`, `test`); of
    files that lie side by side, the class is what stands before the first `_` of a name. Without splits, a tenth of
    every class becomes the test split by the seed; equal files stay in one split.

    Raises:
        DataError: files of which no class can be told, or an archive that cannot be read.
    """
    files = _files(path)
    found = [(place, file) for place, file in files if form.holds(place.name)]
    if not found:
        return None
    placed = [(place.parts[_common(place for place, _ in found) :], file) for place, file in found]
    splits, notes = _splits(path, form, placed)
    others = len(files) - len(found)
    if others:
        odd = next(place for place, _ in files if not form.holds(place.name))
        notes[f"{others} file{'s' * (others > 1)}"] = f"of {path.name} no {form.what}, such as {odd.name}"
    if set(splits) == {"train"}:
        splits, notes["test"] = _with_test(splits["train"], seed), "is a tenth of the files, cut off by the seed"
    return Raw(path.stem, {name: as_rows(splits[name], form) for name in SPLITS if splits.get(name)}, notes)


def as_rows(examples: Sequence[Example], form: MediaForm) -> Dataset:
    """A split with the form's column and a column `label` of class names."""
    columns = {form.column: [file.cell() for file, _ in examples], "label": [label for _, label in examples]}
    return Dataset.from_dict(columns, Features({form.column: CELL, "label": Value("string")}))


def _files(path: Path) -> list[tuple[PurePosixPath, MediaFile]]:
    """Files below a folder or in an archive, by their place in it; none of a folder of rows."""
    if path.is_dir():
        if any(p.suffix.lower() in FORMATS and split_called(p.stem) for p in path.iterdir()):
            return []
        there = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        return [(PurePosixPath(p.relative_to(path).as_posix()), MediaFile(str(p), None, str(p))) for p in there]
    if path.suffix.lower() != ".zip":
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if not name.endswith("/"))
            names = [name for name in names if not PurePosixPath(name).name.startswith(".")]
            return [(PurePosixPath(n), MediaFile(f"{n} in {path}", archive.read(n))) for n in names]
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path}: {error}") from None


def _common(places: Iterable[PurePosixPath]) -> int:
    """Number of folders that all files lie in, none of which tells a class or a split."""
    parents = [place.parts[:-1] for place in places]
    same = takewhile(lambda level: len(set(level)) == 1 and not split_called(level[0]), zip(*parents, strict=False))
    return len(list(same))


def _splits(
    path: Path, form: MediaForm, placed: Sequence[tuple[tuple[str, ...], MediaFile]]
) -> tuple[dict[str, list[Example]], dict[str, str]]:
    """Split -> files with their class, both by folder or the beginning of the file's name; and notes."""
    splits, notes = defaultdict[str, list[Example]](list), dict[str, str]()
    named = all(len(parts) > 1 and split_called(parts[0]) for parts, _ in placed)
    for parts, file in placed:
        split, folders = (split_called(parts[0]), parts[1:-1]) if named else ("train", parts[:-1])
        label = folders[0] if folders else parts[-1].partition("_")[0] if "_" in parts[-1] else ""
        if not label:
            raise DataError(
                f"no class can be told of {file.name}: {form.what} lie in a folder for each class, which may lie in "
                "folders train, validation and test, or their names begin with the class and _"
            )
        if not folders:
            notes["label"] = "is what stands before the first _ of a file's name"
        splits[str(split)].append((file, label))
    return splits, notes


def _with_test(examples: list[Example], seed: int) -> dict[str, list[Example]]:
    labels = [label for _, label in examples]
    kept, held = cut(labels, group([file.digest()] for file, _ in examples), TEST, seed)
    return {"train": [examples[i] for i in kept], "test": [examples[i] for i in held]}
