"""Several models of one base: what they have in common is in memory once."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from smidgen.common.module_modes import copied
from smidgen.common.wrappers import bare
from smidgen.ports.attachment_record import base_tensors
from smidgen.sites.new_tensors import MARK
from smidgen.sites.quantised.maps import share_stored, storage_of

Model = TypeVar("Model", bound=nn.Module)


def shared_copy(model: Model, same: bool = False) -> Model:
    """A copy whose base parameters and buffers are the model's own in memory; what is attached is copied.

    The Parameter objects are others, so that freezing them or attaching to the copy leaves the model alone; `same`
    lets the copy have the very objects, which go with the model when that is moved to a device.
    """
    memo: dict[int, object] = {}
    for parameter in base_tensors(model).values():
        if same:
            memo[id(parameter)] = parameter
            continue
        memo[id(parameter)] = twin = nn.Parameter(parameter.detach(), requires_grad=False)
        if getattr(parameter, MARK, False):
            setattr(twin, MARK, True)
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    share_stored(bare(model), memo)
    return copied(bare(model), memo)


def share_parameters(first: nn.Module, other: nn.Module) -> int:
    """Let a model have another's Parameter objects wherever name, shape and values are the same; gives their number."""
    known, count = dict(first.named_parameters(remove_duplicate=False)), 0
    for path, module in list(other.named_modules()):
        if storage_of(module) is not None:
            continue  # codes say nothing without their scales
        for term, own in list(module._parameters.items()):
            given = known.get(f"{path}.{term}" if path else term)
            if own is None or given is None or own is given or own.shape != given.shape or own.dtype != given.dtype:
                continue
            if torch.equal(own.to(given.device), given):
                module._parameters[term] = given
                count += 1
    return count
