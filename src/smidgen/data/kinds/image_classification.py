"""Classification of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor, nn

from smidgen.common.errors import DataError
from smidgen.data.encoded import Example
from smidgen.data.kinds.base import Batch, Collate, Outputs
from smidgen.data.kinds.media_kind import MediaClassification
from smidgen.data.media.class_folders import MediaForm
from smidgen.data.media.image_arrays import read_idx, read_npz
from smidgen.data.media.image_reading import MODES, as_png, check_header, open_image
from smidgen.data.media.media_file import MediaFile
from smidgen.data.processor import Processor, image_processor_in
from smidgen.data.readers import Raw

SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"])


class ImageClassification(MediaClassification):
    """An image, one of several labels: a folder for each class, a column of images, .npz, or MNIST's files."""

    name = "image-classification"
    model_class = "AutoModelForImageClassification"
    processor_class = "AutoImageProcessor"
    form = MediaForm("image", "images", SUFFIXES)
    feature = datasets.Image

    def read(self, path: Path, seed: int) -> Raw | None:
        """A folder or a .zip with a folder for each class, arrays in an .npz file, or a folder of MNIST's files."""
        if path.suffix.lower() == ".npz":
            return read_npz(path, self.form)
        return (read_idx(path, self.form) if path.is_dir() else None) or super().read(path, seed)

    def check(self, file: MediaFile) -> None:
        """By its first bytes."""
        check_header(file)

    def check_processor(self, processor: Processor) -> None:
        """It is or holds an image processor."""
        image_processor_in(processor, self.name)

    def collator(self, processor: Processor, multiple: int = 1, model: nn.Module | None = None) -> Collate:
        """pixel_values (B, C, H, W) as the image processor makes them."""
        channels = int(getattr(getattr(model, "config", None), "num_channels", 3))
        if channels not in MODES:
            raise DataError(f"images have 1, 3 or 4 channels, the model takes {channels}")
        return ImageCollator(image_processor_in(processor, self.name), channels)

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Outputs:
        """As the model does. Raises DataError if it takes images of another size than its processor makes."""
        try:
            return super().forward(model, batch)
        except ValueError as error:
            shape = tuple(batch["pixel_values"].shape)
            said = " ".join(str(error).split())
            raise DataError(f"the model takes no pixel_values {shape}, which its processor makes: {said}") from error

    def as_file(self, value: object, name: str) -> MediaFile:
        """A new input: a path, bytes, an image of Pillow's, an array of bytes (H, W) or (H, W, C)."""
        if hasattr(value, "save") or isinstance(value, np.ndarray):
            return MediaFile(name, as_png(value))
        return MediaFile.of(value, name)


@dataclass(frozen=True)
class ImageCollator:
    """Reads images and stacks them.

    Attributes:
        processor: of transformers, for images.
        channels: 1, 3 or 4, that images are turned into.
    """

    processor: Processor
    channels: int = 3

    def __call__(self, examples: list[Example]) -> Batch:
        """pixel_values (B, C, H, W), and labels (B,) if the examples have them. Raises DataError, naming the file."""
        images = [open_image(MediaFile.of(example["image"]), self.channels) for example in examples]
        options = {"input_data_format": "channels_first"} if self.channels == 1 else {}
        pixels = [np.asarray(image)[None] for image in images] if self.channels == 1 else images
        try:
            batch = dict(self.processor(images=pixels, return_tensors="pt", **options))
        except ValueError as error:
            what = f"{self.channels} channel{'s' * (self.channels > 1)}"
            said = " ".join(str(error).split())
            raise DataError(f"{type(self.processor).__name__} takes no images of {what}: {said}") from error
        if "labels" in examples[0]:
            batch["labels"] = torch.tensor([example["labels"] for example in examples])
        return batch
