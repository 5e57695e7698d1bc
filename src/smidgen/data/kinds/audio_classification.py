"""Classification of sounds."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import datasets
import torch
from datasets import Dataset
from torch import nn

from smidgen.common.errors import DataError
from smidgen.data.encoded import Encoded, Example
from smidgen.data.kinds.base import Batch, Collate
from smidgen.data.kinds.media_kind import MediaClassification
from smidgen.data.media.class_folders import MediaForm
from smidgen.data.media.media_file import MediaFile
from smidgen.data.media.sound_reading import ResampledWarning, as_wav, read_sound, sound_header
from smidgen.data.processor import Processor, feature_extractor_in

SUFFIXES = frozenset([".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif"])


class AudioClassification(MediaClassification):
    """A sound, one of several labels: a folder for each class, or names that begin with it; a column of sounds."""

    name = "audio-classification"
    model_class = "AutoModelForAudioClassification"
    processor_class = "AutoFeatureExtractor"
    form = MediaForm("audio", "sounds", SUFFIXES)
    feature = datasets.Audio

    def check(self, file: MediaFile) -> None:
        """By its header."""
        sound_header(file)

    def check_processor(self, processor: Processor) -> None:
        """It is or holds a feature extractor with a rate."""
        _rate(feature_extractor_in(processor, self.name))

    def encode(
        self, rows: Dataset, processor: Processor, text: Sequence[str], label: str | None, max_length: int | None
    ) -> Encoded:
        """Files, their lengths in samples at the model's rate, and labels. Warns of those at another rate."""
        found = super().encode(rows, processor, text, label, max_length)
        wanted = _rate(feature_extractor_in(processor, self.name))
        headers = [sound_header(MediaFile.of(example["audio"])) for example in found]
        others = Counter(rate for _, rate in headers if rate != wanted)
        if others:
            rates = ", ".join(f"{count:,} at {rate:,} Hz" for rate, count in sorted(others.items()))
            said = f"of {len(headers):,} sounds {rates} are resampled to the model's {wanted:,} Hz"
            warnings.warn(said, ResampledWarning, stacklevel=3)
        lengths = [round(frames * wanted / rate) for frames, rate in headers]
        examples = [{**example, "samples": n} for example, n in zip(found, lengths, strict=True)]
        return Encoded(examples, None, lengths=lengths)

    def length(self, example: Mapping[str, object]) -> int:
        """Samples at the model's rate."""
        samples = example["samples"]
        assert isinstance(samples, int)
        return samples

    def collator(self, processor: Processor, multiple: int = 1, model: nn.Module | None = None) -> Collate:
        """What the feature extractor makes of the sounds, padded to the longest where it has no length of its own."""
        extractor = feature_extractor_in(processor, self.name)
        return SoundCollator(cast(Processor, extractor), _rate(extractor))

    def as_file(self, value: object, name: str) -> MediaFile:
        """A new input: a path, bytes, or a pair of values (samples,) or (samples, channels) and their rate."""
        if isinstance(value, tuple) and len(value) == 2:
            samples, rate = value
            return MediaFile(name, as_wav(samples, rate))
        return MediaFile.of(value, name)


@dataclass(frozen=True)
class SoundCollator:
    """Reads sounds and makes a batch of them.

    Attributes:
        extractor: of transformers, for sounds.
        rate: samples a second that it takes.
    """

    extractor: Processor
    rate: int

    def __call__(self, examples: list[Example]) -> Batch:
        """The extractor's tensors, and labels (B,) if the examples have them. Raises DataError, naming the file."""
        sounds = [read_sound(MediaFile.of(example["audio"]), self.rate) for example in examples]
        padding = inspect.signature(self.extractor.__call__).parameters.get("padding")
        options = {"padding": True} if padding is not None and padding.default is False else {}
        batch = dict(self.extractor(sounds, sampling_rate=self.rate, return_tensors="pt", **options))
        if "labels" in examples[0]:
            batch["labels"] = torch.tensor([example["labels"] for example in examples])
        return batch


def _rate(extractor: object) -> int:
    rate = getattr(extractor, "sampling_rate", None)
    if not isinstance(rate, int):
        raise DataError(f"{type(extractor).__name__} does not say how many samples a second its model takes")
    return rate
