"""Processor: what makes a model's inputs, as transformers.AutoProcessor gives it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor
from transformers import BaseImageProcessor, FeatureExtractionMixin, PreTrainedTokenizerBase

from smidgen.common.errors import DataError

_Part = TypeVar("_Part", PreTrainedTokenizerBase, BaseImageProcessor, FeatureExtractionMixin)


class Processor(Protocol):
    """A tokenizer, an image processor, a feature extractor, or one object that holds several of them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        """Texts, images or sounds as a model's inputs."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> object:
        """Write it into a folder."""


def given_processor(processor: Processor | None, tokenizer: Processor | None) -> Processor | None:
    """`processor=`, or `tokenizer=`, its name for texts. Raises DataError if both are given."""
    if processor is not None and tokenizer is not None and processor is not tokenizer:
        raise DataError("processor= and tokenizer= are two names of one argument; give one of them")
    return tokenizer if processor is None else processor


def tokenizer_in(processor: Processor, kind: str) -> PreTrainedTokenizerBase:
    """The tokenizer that a processor is or holds. Raises DataError if there is none."""
    found = _part(processor, PreTrainedTokenizerBase, "tokenizer")
    if found is None:
        raise DataError(_unfit(processor, kind, "texts", "AutoTokenizer"))
    return found


def image_processor_in(processor: Processor, kind: str) -> BaseImageProcessor:
    """The image processor that a processor is or holds. Raises DataError if there is none."""
    found = _part(processor, BaseImageProcessor, "image_processor")
    if found is None:
        raise DataError(_unfit(processor, kind, "images", "AutoImageProcessor"))
    return found


def feature_extractor_in(processor: Processor, kind: str) -> FeatureExtractionMixin:
    """The feature extractor that a processor is or holds. Raises DataError if there is none."""
    found = _part(processor, FeatureExtractionMixin, "feature_extractor")
    if found is None:
        raise DataError(_unfit(processor, kind, "sounds", "AutoFeatureExtractor"))
    return found


def _part(processor: Processor, wanted: type[_Part], name: str) -> _Part | None:
    return processor if isinstance(processor, wanted) else getattr(processor, name, None)


def _unfit(processor: Processor, kind: str, what: str, loader: str) -> str:
    return f"a {kind} task reads {what}, which {type(processor).__name__} does not; load one with transformers.{loader}"
