"""Edits of several layouts at one module: each acts on the rows of a mixed batch that have its layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from smidgen.common.errors import AttachError
from smidgen.common.hook_types import Args, first_of, like
from smidgen.methods.capabilities import EditsInput
from smidgen.ports.by_row.layouts import Layouts
from smidgen.ports.edit import Edit
from smidgen.ports.forward_state import state
from smidgen.ports.module_edits import ModuleEdits, edited_input, edited_output
from smidgen.ports.tap import entered


class ModuleLayouts(Layouts[ModuleEdits]):
    """Layout -> its edits at one module; `sees_input` once any of them has edited what enters."""

    sees_input = False

    def fresh(self) -> ModuleEdits:
        """An empty place."""
        return ModuleEdits()

    @property
    def reads_entry(self) -> bool:
        """Whether a formula of any layout reads what entered the sublayer."""
        return any(cast(ModuleEdits, edits).reads_entry for edits in self.values())


def by_block(
    layouts: ModuleLayouts, place: str, function: Callable[..., Tensor], first: Tensor, *others: Tensor
) -> Tensor:
    """The first of some tensors (B, ...), with the rows of each block that has edits here replaced.

    Args:
        function: of a layout's edits and those rows of each tensor, to the new ones.

    Raises:
        AttachError: a tensor has not one part for each row.
    """
    now = state()
    mix = now.mixed()
    if not any(layouts.of(block.layout) for block in mix.blocks):
        return first
    for x in (first, *others):
        mix.check(x, place)
    pieces = []
    for block in mix.blocks:
        edits, part = layouts.of(block.layout), first[block.rows]
        if edits is not None:
            with now.on(block):
                part = function(edits, part, *(x[block.rows] for x in others))
        pieces.append(part)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class LayoutsModule(nn.Module):
    """A module with edits of several layouts, as its hooks see it."""

    layouts: ModuleLayouts


def run_layouts_before(module: LayoutsModule, args: Args) -> Args:
    """Forward pre-hook."""
    if not args:
        raise AttachError(f"{type(module).__name__} was called without a positional input; its edits need one")
    return (by_block(module.layouts, type(module).__name__, edited_input, args[0]), *args[1:])


def run_layouts_after(module: LayoutsModule, args: Args, output: object) -> object:
    """Forward hook. Of a tuple the first entry is the output."""
    layouts = module.layouts
    y, rest = first_of(output)
    came = [entered(module, y)] if "tap" in module._modules and layouts.reads_entry else []

    def function(edits: ModuleEdits, y: Tensor, x: Tensor, *came: Tensor) -> Tensor:
        return edited_output(edits, y, x, came[0] if came else None, None)

    return like(output, by_block(layouts, type(module).__name__, function, y, args[0], *came), rest)


def add_layout(module: nn.Module, layout: str, key: str, edit: Edit) -> None:
    """Put an edit on a module, behind those of its layout, and place the hooks once."""
    if "layouts" not in module._modules:
        module.add_module("layouts", ModuleLayouts())
        module.__dict__["_layout_handles"] = [module.register_forward_hook(run_layouts_after)]
    layouts = module.layouts
    assert isinstance(layouts, ModuleLayouts)
    if isinstance(edit.method, EditsInput) and not layouts.sees_input:
        module.__dict__["_layout_handles"].append(module.register_forward_pre_hook(run_layouts_before))
        layouts.sees_input = True
    layouts.add(layout, key, edit)


def drop_layout(module: nn.Module, layout: str) -> None:
    """Take a layout's edits off a module; with the last one also the hooks."""
    layouts = module._modules.get("layouts")
    if layouts is None:
        return
    assert isinstance(layouts, ModuleLayouts)
    layouts.drop(layout)
    if not len(layouts):
        for handle in module.__dict__.pop("_layout_handles"):
            handle.remove()
        del module._modules["layouts"]
