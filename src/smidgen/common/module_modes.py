"""Train and eval mode of a model's modules, and what modules keep between calls while in eval mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Whatever modes are set inside: afterwards each module has its own again, also after an error.

    What a class made from its weights in eval mode is not kept either: see `renew_caches`.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        _set(modes)
        renew_caches(model)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside."""
    with modes_kept(model):
        model.eval()
        yield


def renew_caches(model: nn.Module) -> None:
    """Let modules forget what they made from their weights, as `train()` does; modes stay as they are.

    LeViT's attentions look their biases up once in eval mode and keep the result, with its graph, until `train()` is
    called. That call is the only sign that a class gives of such a cache, so it is made where a class has a `train` of
    its own.
    """
    for module in model.modules():
        if type(module).train is not nn.Module.train:
            modes = {part: part.training for part in module.modules()}
            module.train()
            _set(modes)


def copied(model: Model, memo: Mapping[int, object] | None = None) -> Model:
    """A deep copy of a model. `memo`: id of an object -> what stands for it in the copy, as deepcopy takes it."""
    renew_caches(model)  # a cache with a graph cannot be copied
    return copy.deepcopy(model, None if memo is None else dict(memo))


def _set(modes: dict[nn.Module, bool]) -> None:
    for module, mode in modes.items():
        module.training = mode
