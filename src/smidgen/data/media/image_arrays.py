"""Images in .npz files and in MNIST's own format."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from smidgen.common.errors import DataError
from smidgen.data.media.class_folders import MediaForm, as_rows
from smidgen.data.media.image_reading import as_png
from smidgen.data.media.media_file import MediaFile
from smidgen.data.readers import Raw

PLAIN = (("images", "labels"), ("image", "label"), ("x", "y"), ("data", "labels"))
SPLIT = {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")}
PACKED = ("blob", "offsets", "label")
IDX = {"train": "train", "test": "t10k"}

Array = NDArray[np.generic]


def read_npz(path: Path, form: MediaForm) -> Raw | None:
    """Splits of an .npz file of images; None if it holds none.

    Images are arrays (N, H, W) or (N, H, W, C) of bytes under `images` and `labels`, `x` and `y`, or `x_train`,
    `y_train`, `x_test` and `y_test`; or files, as `blob` with their `offsets` (N + 1) and `label`. `is_test` parts the
    test split, `classes` names the labels.

    Raises:
        DataError: it cannot be read, or images and labels differ in number.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    names = arrays.get("classes")
    if set(PACKED) <= set(arrays):
        ends, blob = arrays["offsets"], arrays["blob"].tobytes()
        files = [MediaFile(f"image {i} of {path.name}", blob[a:b]) for i, (a, b) in enumerate(pairwise(ends))]
        return _parted(path, form, files, arrays["label"], names, arrays.get("is_test"))
    splits = {split: pair for split, pair in SPLIT.items() if set(pair) <= set(arrays)}
    if splits:
        parts = {s: _pngs(arrays[x], f"{path.name} {s}") for s, (x, _) in splits.items()}
        rows = {s: _rows(path, form, files, arrays[splits[s][1]], names) for s, files in parts.items()}
        return Raw(path.stem, rows)
    pair = next((pair for pair in PLAIN if set(pair) <= set(arrays)), None)
    if pair is None:
        return None
    files = _pngs(arrays[pair[0]], path.name)
    return _parted(path, form, files, arrays[pair[1]], names, arrays.get("is_test"))


def read_idx(path: Path, form: MediaForm) -> Raw | None:
    """Splits of a folder of MNIST's files (`t10k-images-idx3-ubyte.gz`, ...); None if it holds none.

    With `t10k` files alone, these are what there is to learn from.

    Raises:
        DataError: a file is not of that format.
    """
    rows = {}
    for split, start in IDX.items():
        images, labels = (_idx_file(path, f"{start}-{what}-ubyte") for what in ("images-idx3", "labels-idx1"))
        if images is not None and labels is not None:
            rows[split] = _rows(path, form, _pngs(_idx(images), images.name), _idx(labels), None)
    return Raw(path.name, rows if "train" in rows else {"train": rows["test"]}) if rows else None


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((folder / n for n in (name, f"{name}.gz") if (folder / n).is_file()), None)


def _idx(path: Path) -> NDArray[np.uint8]:
    """Two zero bytes, the type (8: bytes), the number of sizes, the sizes as big-endian 32 bit, the values."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if data[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not of MNIST's format: it begins with {data[:4]!r}")
    shape = np.frombuffer(data, ">i4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _pngs(images: Array, name: str) -> list[MediaFile]:
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(f"{name} holds images of shape {images.shape} and type {images.dtype}; expected bytes, "
                        "(N, H, W) or (N, H, W, C)")  # fmt: skip
    return [MediaFile(f"image {i} of {name}", as_png(image)) for i, image in enumerate(images)]


def _parted(
    path: Path, form: MediaForm, files: Sequence[MediaFile], labels: Array, names: Array | None, is_test: Array | None
) -> Raw:
    if is_test is None:
        return Raw(path.stem, {"train": _rows(path, form, files, labels, names)})
    masks = {"train": ~is_test.astype(bool), "test": is_test.astype(bool)}
    kept = {split: np.flatnonzero(mask).tolist() for split, mask in masks.items() if mask.any()}
    rows = {s: _rows(path, form, [files[i] for i in places], labels[places], names) for s, places in kept.items()}
    return Raw(path.stem, rows)


def _rows(path: Path, form: MediaForm, files: Sequence[MediaFile], labels: Array, names: Array | None) -> Dataset:
    if len(files) != len(labels):
        raise DataError(f"{path} holds {len(files)} images and {len(labels)} labels")
    told = [str(value if names is None else names[int(value)]) for value in np.asarray(labels).reshape(-1).tolist()]
    return as_rows(list(zip(files, told, strict=True)), form)
