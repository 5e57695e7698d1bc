"""What a module keeps that was made from its weights, renewed when they change."""

from __future__ import annotations

from torch import nn


def renew_caches(model: nn.Module) -> None:
    """Let modules in eval mode forget what they made from their weights, as `train()` does.

    LeViT's attentions look their biases up once and keep the result until `train()` is called. That call is the only
    sign that a class gives of such a cache: where a class has a `train` of its own, it is made, and the modes of all
    modules below are put back.
    """
    for module in model.modules():
        if not module.training and type(module).train is not nn.Module.train:
            modes = [(part, part.training) for part in module.modules()]
            module.train()
            module.eval()
            for part, mode in modes:
                part.training = mode
