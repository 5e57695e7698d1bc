"""Hooks on modules, and functions that stand in for methods of one object, for code that watches what is attached.

Hooks of a torch module and entries of its own `__dict__` outlive whoever put them there, so that they are put and taken
away in this package alone.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.hook_types import Args, Kwargs

Before = Callable[[nn.Module, Args, Kwargs], None]
After = Callable[[nn.Module, Args, Kwargs, object], Tensor | None]


def watch_calls(
    module: nn.Module, *, before: Before | None = None, after: After | None = None, first: bool = False
) -> list[RemovableHandle]:
    """Tell of each call of a module; what `after` returns, unless None, becomes its output.

    Args:
        first: `after` is called before all other hooks; what edits and casts make of the output is behind it.
    """
    handles = [] if before is None else [module.register_forward_pre_hook(before, with_kwargs=True)]
    if after is not None:
        handles.append(module.register_forward_hook(after, prepend=first, with_kwargs=True))
    return handles


def stand_in(module: nn.Module, name: str, function: Callable[..., object]) -> None:
    """Let a function stand in for a method of this object."""
    module.__dict__[name] = function


def restore_methods(module: nn.Module, *names: str) -> None:
    """Take away what stands in for methods, if anything does."""
    for name in names:
        module.__dict__.pop(name, None)
