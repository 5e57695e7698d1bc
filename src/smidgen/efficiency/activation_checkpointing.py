"""Compute the activations of blocks a second time in the backward pass, in place of keeping them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol, cast

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from smidgen.common.errors import TrainError
from smidgen.common.wrappers import bare
from smidgen.planning.frozen_modules import frozen_prefix
from smidgen.planning.plans import Plan
from smidgen.ports.attachment_record import attachment
from smidgen.sites.discovery import find_blocks

_ABSENT = object()


class _Caching(Protocol):
    """A config that says whether keys and values are kept."""

    use_cache: bool


@contextmanager
def recomputing(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, a forward pass in training mode keeps of each block only its input, and backward computes the rest again.

    That holds for the blocks at and above the lowest edit. Those below keep nothing anyway, and run once. Gradients are
    the same bit for bit: the random generator's state is kept with the input, so dropout falls as before. The blocks'
    own switch is used (transformers' `GradientCheckpointingLayer`), on these blocks alone, and a causal LM's
    `config.use_cache` is off. All is restored on exit.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174

    Raises:
        AttachError: nothing is attached.
        TrainError: the model has no blocks, or blocks without that switch.
    """
    inside = bare(model)
    blocks = recomputed(inside, attachment(inside).plan)
    state = {"gradient_checkpointing": True, "_gradient_checkpointing_func": partial(checkpoint, use_reentrant=False)}
    own = [(block, {name: block.__dict__.get(name, _ABSENT) for name in state}) for block in blocks]
    configs = _caching(inside)
    try:
        for block in blocks:
            block.__dict__.update(state)
        for config in configs:
            config.use_cache = False
        yield model
    finally:
        for block, before in own:
            _put_back(block, before)
        for config in configs:
            config.use_cache = True


def recomputed(model: nn.Module, plan: Plan) -> list[nn.Module]:
    """The blocks at and above the lowest edit; none if only the head is trained.

    Raises:
        TrainError: the model has no blocks, or blocks that cannot be computed again.
    """
    every, name = [block for blocks in find_blocks(model).values() for block in blocks], type(model).__name__
    if not every:
        raise TrainError(f"{name} has no stack of blocks, so there is nothing to recompute; leave recompute out")
    frozen = set(frozen_prefix(model, plan))
    blocks = [block for block in dict.fromkeys(every) if block not in frozen]
    for block in blocks:
        if not isinstance(block, GradientCheckpointingLayer):
            raise TrainError(
                f"{type(block).__name__}, a block of {name}, cannot be recomputed: it is not one of transformers' "
                "GradientCheckpointingLayer; leave recompute out, or use a smaller batch"
            )
    return blocks


def _put_back(block: nn.Module, before: dict[str, object]) -> None:
    for name, value in before.items():
        if value is _ABSENT:
            block.__dict__.pop(name, None)
        else:
            block.__dict__[name] = value


def _caching(model: nn.Module) -> list[_Caching]:
    """The configs that ask for a cache of keys and values, which would be filled twice."""
    found = {id(c): c for m in model.modules() if getattr(c := getattr(m, "config", None), "use_cache", None) is True}
    return cast("list[_Caching]", list(found.values()))
