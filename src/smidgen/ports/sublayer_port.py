"""The sublayer port: an edit where a sublayer is left, with a tap if its formula reads what entered."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.errors import AttachError
from smidgen.methods.capabilities import EditsInput
from smidgen.planning.entry import Entry
from smidgen.planning.rules.sublayers import SublayerRules
from smidgen.ports.base import Port
from smidgen.ports.by_row.module_layouts import add_layout, drop_layout
from smidgen.ports.edit import Edit, drop_edits
from smidgen.ports.module_edits import ModuleEdit, add_edit, check_editable
from smidgen.ports.module_port import folded_module, why_no_module_rows
from smidgen.ports.tap import add_tap, drop_tap
from smidgen.sites.site import Site, Sublayer


class SublayerPort(SublayerRules, Port):
    """Attention, cross-attention and feed-forward sublayers."""

    edit = ModuleEdit

    def check(self, model: nn.Module, entry: Entry) -> None:
        """Raises AttachError if the module at the sublayer's end cannot carry edits."""
        if isinstance(entry.method, EditsInput):
            raise AttachError(
                f"{entry.method} edits the input of the {entry.site.kind} at {entry.site.name}, which several maps "
                "share"
            )
        check_editable(model.get_submodule(entry.site.path), entry.site)

    def place(self, model: nn.Module, site: Site, key: str, edit: Edit) -> list[RemovableHandle]:
        """At the sublayer's end, with a tap at its beginning."""
        assert isinstance(site, Sublayer)
        assert isinstance(edit, ModuleEdit)
        module = model.get_submodule(site.path)
        add_edit(module, key, edit)
        handle = add_tap(model.get_submodule(site.entry), module) if edit.reads_entry else None
        return [] if handle is None else [handle]

    def remove(self, model: nn.Module, site: Site) -> None:
        """Take all edits and the tap away."""
        assert isinstance(site, Sublayer)
        drop_edits(model.get_submodule(site.path))
        for path in (site.entry, site.path):
            drop_tap(model.get_submodule(path))

    def folded(self, model: nn.Module, path: str) -> dict[str, Tensor]:
        """Those of the map that the sublayer is left by."""
        return folded_module(model, path)

    def why_no_rows(self, edit: Edit) -> str | None:
        """As at a module."""
        return why_no_module_rows(edit)

    def place_layout(self, model: nn.Module, site: Site, layout: str, key: str, edit: Edit) -> list[RemovableHandle]:
        """At the sublayer's end, with a tap at its beginning."""
        assert isinstance(site, Sublayer)
        assert isinstance(edit, ModuleEdit)
        module = model.get_submodule(site.path)
        add_layout(module, layout, key, edit)
        if edit.reads_entry and (handle := add_tap(model.get_submodule(site.entry), module)) is not None:
            module.__dict__["_layout_handles"].append(handle)
        return []

    def remove_layout(self, model: nn.Module, site: Site, layout: str) -> None:
        """Take a layout's edits away; with the last one also the tap."""
        assert isinstance(site, Sublayer)
        module = model.get_submodule(site.path)
        drop_layout(module, layout)
        if "layouts" not in module._modules:
            for path in (site.entry, site.path):
                drop_tap(model.get_submodule(path))
