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


TONES = {"high": 900.0, "low": 150.0, "middle": 400.0}
RATE = 4000
WAV2VEC2 = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
            "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2, "vocab_size": 8, "layerdrop": 0.0, "mask_time_prob": 0.0,
            "classifier_proj_size": 16, "num_feat_extract_layers": 2}  # fmt: skip
DRY = ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout")
AST = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 4,
       "num_mel_bins": 16, "max_length": 24, "frequency_stride": 4, "time_stride": 4, "hidden_dropout_prob": 0.0,
       "attention_probs_dropout_prob": 0.0}  # fmt: skip


def tone(label, number, rate=RATE):
    """A tone with noise, 0.1 to 0.15 seconds."""
    random = np.random.RandomState(number)
    time = np.arange(int(rate * (0.1 + 0.01 * (number % 6)))) / rate
    return (0.5 * np.sin(2 * np.pi * TONES[label] * time) + 0.05 * random.randn(len(time))).astype(np.float32)


def tones(folder, train=8, held=4, splits=("train", "validation", "test"), rate=RATE):
    """folder/<split>/<class>/<n>.wav; without splits folder/<class>_<n>.wav."""
    import soundfile

    for i, split in enumerate(splits or ("",)):
        for j, label in enumerate(TONES):
            place = folder / split / label if split else folder
            place.mkdir(parents=True, exist_ok=True)
            for n in range(train if not i else held):
                name = f"{n}.wav" if split else f"{label}_{n}.wav"
                soundfile.write(place / name, tone(label, 1000 * i + 100 * j + n, rate), rate)
    return folder


def drawn(cls, config, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).eval()
    shake(model.parameters(), 0.1)
    return model


def wav2vec2(labels=3):
    """A tiny wav2vec2 for sounds, and its feature extractor."""
    config = T.Wav2Vec2Config(**WAV2VEC2, **dict.fromkeys(DRY, 0.0), num_labels=labels)
    extractor = T.Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True, return_attention_mask=True)
    return drawn(T.Wav2Vec2ForSequenceClassification, config), extractor


def ast(labels=3):
    """A tiny audio spectrogram transformer, and its feature extractor."""
    extractor = T.ASTFeatureExtractor(sampling_rate=RATE, num_mel_bins=16, max_length=24, mean=0.0, std=0.25)
    return drawn(T.ASTForAudioClassification, T.ASTConfig(**AST, num_labels=labels)), extractor
