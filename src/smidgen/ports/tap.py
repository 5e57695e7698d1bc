"""A tap: what entered a sublayer, carried to the edits at its end by the state of the pass."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.errors import AttachError
from smidgen.common.hook_types import Args
from smidgen.ports.forward_state import state


class Tap(nn.Module):
    """The name under which a pass keeps what entered a sublayer; one object without tensors, child of both modules."""


def keep_input(module: nn.Module, args: Args) -> None:
    """Forward pre-hook of the module that a sublayer is entered by, before its own edits.

    Pegasus-X enters its attention with the text and with global tokens, and leaves with the tokens first: what entered
    last is left first. At most two are kept: recomputation may stop before a sublayer is left.
    """
    if not args:
        raise AttachError(f"{type(module).__name__} was called without a positional input; its edits need one")
    tap, taps = module.tap, state().taps
    assert isinstance(tap, Tap)
    taps[tap] = (*taps.get(tap, ())[-1:], args[0])


def entered(module: nn.Module, output: Tensor) -> Tensor:
    """What a tap brings to a module that a sublayer is left by."""
    tap, taps = module.tap, state().taps
    assert isinstance(tap, Tap)
    values = taps.get(tap, ())
    value, taps[tap] = values[-1] if values else None, values[:-1]
    if value is None or value.shape[:-1] != output.shape[:-1]:
        shape = None if value is None else tuple(value.shape)
        raise AttachError(
            f"a sublayer that was entered with {shape} is left with {tuple(output.shape)}: this model calls its parts "
            "in an order of its own, so what entered cannot be read; an adapter of the form 'sequential' works"
        )
    return value


def add_tap(entry: nn.Module, module: nn.Module) -> RemovableHandle | None:
    """Let a sublayer's input reach the edits at its end; None if it does already."""
    if "tap" in module._modules:
        return None
    entry.tap = module.tap = Tap()
    return entry.register_forward_pre_hook(keep_input, prepend=True)


def drop_tap(module: nn.Module) -> None:
    """Take a tap away from one of its two modules."""
    module._modules.pop("tap", None)
