"""What several sites share stands at the model itself, where no hook reads it."""

from __future__ import annotations

from torch import nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.errors import AttachError
from smidgen.planning.entry import Entry
from smidgen.planning.rules.shared import SharedRules
from smidgen.ports.base import Port
from smidgen.ports.edit import Edit, Edits, drop_edits, edits_at, put_edit
from smidgen.sites.site import Site


class SharedPort(SharedRules, Port):
    """The model, as the owner of a pool."""

    def check(self, model: nn.Module, entry: Entry) -> None:
        """Raises AttachError if the model cannot own what these sites share."""
        if hasattr(model, "edits") or not all(site.path for site in entry.sites):
            name = type(model).__name__
            raise AttachError(f"{entry.method} shares tensors, but {name} cannot own them: it has edits of its own")

    def place(self, model: nn.Module, site: Site, key: str, edit: Edit) -> list[RemovableHandle]:
        """At the model."""
        if not edits_at(model):
            model.add_module("edits", Edits())
        put_edit(model, key, edit)
        return []

    def remove(self, model: nn.Module, site: Site) -> None:
        """Take all pools away."""
        drop_edits(model)
