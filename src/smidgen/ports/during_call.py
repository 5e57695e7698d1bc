"""What stands on a module for the length of its call, also when a block is computed again in the backward pass.

transformers checkpoints the `forward` of a block and not its call, so hooks of the block itself do not run the second
time; hooks of modules inside it do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from smidgen.common.hook_types import Args

AnyModule = TypeVar("AnyModule", bound=nn.Module)  # as its hooks see it
Put = Callable[[AnyModule, Args], None]
Take = Callable[[AnyModule, Args, object], None]
Forward = Callable[..., object]


class CheckpointedBlock(GradientCheckpointingLayer):
    """A block of transformers, as the functions here see it."""

    _standing: tuple[tuple[Put[CheckpointedBlock], Take[CheckpointedBlock]], ...]
    _gradient_checkpointing_func: Forward
    _unwrapped: Forward


def stand(
    module: nn.Module, put: Put[AnyModule], take: Take[AnyModule], prepend: bool = False
) -> list[RemovableHandle]:
    """Call `put` before a module's forward and `take` after it, whatever happens in between.

    Both are hooks of torch's signature that give nothing back; `stand_down` takes away what the handles do not.
    """
    handles = [
        module.register_forward_pre_hook(put, prepend=prepend),
        module.register_forward_hook(take, always_call=True),
    ]
    if isinstance(module, GradientCheckpointingLayer):
        standing: tuple[object, ...] = module.__dict__.get("_standing", ())
        if not standing:
            handles.append(module.register_forward_pre_hook(wrap))
            handles.append(module.register_forward_hook(unwrap, always_call=True))
        module.__dict__["_standing"] = (*standing, (put, take))
    return handles


def stand_down(module: nn.Module) -> None:
    """The inverse of `stand`, once its handles are removed."""
    module.__dict__.pop("_standing", None)


def wrap(module: CheckpointedBlock, args: Args) -> None:
    """Pre-hook of a block: what is checkpointed puts up what stands on it, both times."""
    if module.gradient_checkpointing and module.training:
        module._unwrapped = module._gradient_checkpointing_func
        module._gradient_checkpointing_func = partial(_checkpoint, module, module._unwrapped)


def unwrap(module: CheckpointedBlock, args: Args, output: object) -> None:
    """Forward hook of a block (always called)."""
    if "_unwrapped" in module.__dict__:
        module._gradient_checkpointing_func = module.__dict__.pop("_unwrapped")


def _checkpoint(module: CheckpointedBlock, checkpoint: Forward, function: Forward, *args: object) -> object:
    return checkpoint(partial(_standing, module, function), *args)


def _standing(module: CheckpointedBlock, function: Forward, *args: object) -> object:
    for put, _ in module._standing:
        put(module, args)
    try:
        return function(*args)
    finally:
        for _, take in module._standing:
            take(module, args, None)
