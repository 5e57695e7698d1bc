"""The sublayer port: a tap that carries a sublayer's input to the edit at its end."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.errors import AttachError


class Tap(nn.Module):
    """What entered a sublayer, on its way to where it is left; one object without tensors, child of both modules.

    Pegasus-X enters its attention with the text and with global tokens, and leaves with the tokens first: what entered
    last is left first. At most two are kept: recomputation may stop before a sublayer is left.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: tuple[Tensor, ...] = ()


def keep_input(module: Any, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of the module that a sublayer is entered by, before its own edits."""
    if not args:
        raise AttachError(f"{type(module).__name__} was called without a positional input; its edits need one")
    module.tap.values = (*module.tap.values[-1:], args[0])


def _entered(module: Any, output: Tensor) -> Tensor | None:
    """What a tap brings, to a module that a sublayer is left by; the one it is entered by may have edits as well."""
    if not any(edit.reads_entry for edit in module.edits.values()):
        return None
    values = module.tap.values
    value, module.tap.values = values[-1] if values else None, values[:-1]
    if value is None or value.shape[:-1] != output.shape[:-1]:
        shape = None if value is None else tuple(value.shape)
        raise AttachError(
            f"a sublayer that was entered with {shape} is left with {tuple(output.shape)}: this model calls its parts "
            "in an order of its own, so what entered cannot be read; an adapter of the form 'sequential' works"
        )
    found: Tensor = value
    return found


def add_tap(entry: Any, module: Any) -> RemovableHandle | None:
    """Let a sublayer's input reach the edits at its end; None if it does already."""
    if "tap" in module._modules:
        return None
    entry.tap = module.tap = Tap()
    handle: RemovableHandle = entry.register_forward_pre_hook(keep_input, prepend=True)
    return handle


def drop_tap(module: Any) -> None:
    """Take a tap away from one of its two modules."""
    module._modules.pop("tap", None)
