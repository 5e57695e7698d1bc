"""Stacks of blocks that are computed in one autograd function, which recomputes them on the way back (Reformer).

Autograd runs such a function backwards only if what enters it needs a gradient. Below the lowest edit nothing does, and
what is trained inside would get none. So what enters is made to need one where something inside is trained; nothing
flows further down, because it is detached first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.hook_types import Args, Kwargs
from smidgen.sites.module_kinds import reversible_stacks
from smidgen.sites.roles import within


def open_entries(model: nn.Module, paths: Iterable[str]) -> Iterator[RemovableHandle]:
    """Hooks at the reversible stacks in which one of these modules lies."""
    trained = list(paths)
    for path, module in reversible_stacks(model).items():
        if any(within(other, path) for other in trained):
            yield module.register_forward_pre_hook(_needs_gradient, with_kwargs=True)


def _needs_gradient(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    opened = tuple(map(_leaf, args[:1])) + args[1:]
    return opened, {name: _leaf(value) if name == "hidden_states" else value for name, value in kwargs.items()}


def _leaf(states: object) -> object:
    if isinstance(states, Tensor) and torch.is_grad_enabled() and not states.requires_grad:
        return states.detach().requires_grad_()
    return states
