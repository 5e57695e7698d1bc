"""Layout -> its edits at one module, whatever the port: what a layout adds stands beside what the others add."""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, TypeVar, cast

from torch import nn

from smidgen.ports.edit import Edit, Edits

Kind = TypeVar("Kind", bound=Edits)


class Layouts(nn.ModuleDict, Generic[Kind]):
    """Base of what holds several layouts' edits at a module, in eval mode."""

    @abstractmethod
    def fresh(self) -> Kind:
        """An empty place for the edits of one layout."""

    def of(self, layout: str | None) -> Kind | None:
        """A layout's edits; None if it has none here."""
        return cast("Kind | None", self._modules.get(layout or ""))

    def add(self, layout: str, key: str, edit: Edit) -> None:
        """Put an edit behind those of its layout."""
        edits = self.of(layout)
        if edits is None:
            self[layout] = edits = self.fresh()
        edits[key] = edit.eval()

    def drop(self, layout: str) -> None:
        """Take a layout's edits away; nothing where there are none."""
        self._modules.pop(layout, None)
