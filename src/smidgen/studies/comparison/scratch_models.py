"""The same class with fresh weights: what a comparison calls training from scratch."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel


def from_scratch(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model of the same class and configuration whose weights are drawn anew; the global generator is left alone."""
    config = copy.deepcopy(model.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh: PreTrainedModel = type(model)(config)
    nn.Module.to(fresh, model.dtype)
    fresh.eval()
    return fresh
