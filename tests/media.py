"""Tiny images, and a tiny ViT with its processor, built on the spot."""

from __future__ import annotations

import numpy as np
import torch
import transformers as T
from PIL import Image

from smidgen.testing.cases import shake

COLOURS = {"blue": 2, "green": 1, "red": 0}
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8,
       "patch_size": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip


def picture(label, number):
    """8 x 8 x 3 bytes: noise, with one channel brighter."""
    values = np.random.RandomState(number).randint(0, 120, (8, 8, 3))
    values[..., COLOURS[label]] += 100
    return values.astype(np.uint8)


def pictures(folder, train=8, held=4, splits=("train", "validation", "test")):
    """folder/<split>/<class>/<n>.png; without splits folder/<class>/<n>.png."""
    for i, split in enumerate(splits or ("",)):
        for j, label in enumerate(COLOURS):
            place = folder / split / label
            place.mkdir(parents=True, exist_ok=True)
            for n in range(train if not i else held):
                Image.fromarray(picture(label, 1000 * i + 100 * j + n)).save(place / f"{n}.png")
    return folder


def vit(labels=3, seed=0, **options):
    """A tiny ViT for images, in eval mode, with shaken values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T.ViTForImageClassification(T.ViTConfig(**{**VIT, "num_labels": labels, **options})).eval()
    shake(model.parameters(), 0.3)
    return model


def image_processor(side=8, **options):
    return T.ViTImageProcessorPil(size={"height": side, "width": side}, **options)


def saved_vit(folder, **options):
    """A folder that `smidgen.load` reads: a plain ViT, its head to be made anew, and its processor."""
    vit(**options).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder
