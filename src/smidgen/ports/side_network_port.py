"""The side-network port: a network beside a stack of blocks reads what goes from block to block, without gradient, and
what it gives stands in the place of what leaves the stack. No gradient passes through the blocks.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.errors import AttachError
from smidgen.common.hook_types import Args, Kwargs, first_of, like
from smidgen.methods.capabilities import RunsBeside
from smidgen.planning.entry import Entry
from smidgen.planning.rules.blocks import StackRules
from smidgen.ports.base import Port
from smidgen.ports.block_port import model_around, note_text, seen
from smidgen.ports.edit import Edit, EditedModule, Edits, drop_edits, give_edits, put_edit
from smidgen.ports.forward_state import Stream, state
from smidgen.sites.site import Site, StackSite


class StackEdits(Edits[Edit]):
    """The one network beside a stack."""

    def __init__(self, stack: str) -> None:
        super().__init__()
        self.stack = stack


class SideNetworkPort(StackRules, Port):
    """Stacks of blocks. The network stands at the last block, whose output it takes the place of."""

    def check(self, model: nn.Module, entry: Entry) -> None:
        """Raises AttachError if the last block has an attribute of the edits' name."""
        module = model.get_submodule(entry.site.path)
        if hasattr(module, "edits"):
            raise AttachError(f"{type(module).__name__} at {entry.site.path} already has an attribute 'edits'")

    def place(self, model: nn.Module, site: Site, key: str, edit: Edit) -> list[RemovableHandle]:
        """At the last block, with hooks at all of them."""
        assert isinstance(site, StackSite)
        blocks = [model.get_submodule(path) for path in site.blocks]
        around = model_around(model, site.stack)
        handles = [around.register_forward_pre_hook(partial(note_text, site.stack), with_kwargs=True)]
        handles += [blocks[0].register_forward_pre_hook(partial(enter_stack, site.stack), with_kwargs=True)]
        handles += [block.register_forward_hook(partial(tap_block, site.stack)) for block in blocks]
        give_edits(blocks[-1], StackEdits(site.stack), blocks[-1].register_forward_hook(leave_stack))
        put_edit(blocks[-1], key, edit)
        return handles

    def remove(self, model: nn.Module, site: Site) -> None:
        """Take the network away."""
        drop_edits(model.get_submodule(site.path))


def enter_stack(stack: str, block: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Forward pre-hook of the first block: hidden states enter without gradient.

    Raises:
        AttachError: the first argument is no tensor.
    """
    name = "" if args else next(iter(kwargs), "")
    states = args[0] if args else kwargs.get(name)
    if not isinstance(states, Tensor):
        raise AttachError(f"{type(block).__name__} is entered with {type(states).__name__}, not with hidden states")
    states = states.detach()
    state().streams.setdefault(stack, Stream()).states = [states]
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, name: states})


def tap_block(stack: str, block: nn.Module, args: Args, output: object) -> None:
    """Forward hook of every block."""
    state().streams[stack].states.append(first_of(output)[0].detach())


def leave_stack(block: EditedModule[StackEdits], args: Args, output: object) -> object:
    """Forward hook of the last block, behind its tap: the network's output in place of the block's.

    Raises:
        AttachError: the network gives another shape.
    """
    (edit,) = block.edits.all()
    method, tapped = edit.method, state().streams[block.edits.stack].states
    tokens = seen(tapped[-1], edit) if edit.enabled else None
    del state().streams[block.edits.stack]
    if tokens is None:
        return None
    assert isinstance(method, RunsBeside)  # the plan has seen to it
    found = method.beside(edit.cast(tapped[-1].dtype), tapped, tokens, edit.site).to(tapped[-1].dtype)
    if found.shape != tapped[-1].shape:
        raise AttachError(f"{method} gives hidden states {tuple(found.shape)} for {tuple(tapped[-1].shape)}")
    return like(output, found, first_of(output)[1])
