"""A port: one way to touch a model, for the sites of one or several types.

A port finds its sites and says what a plan needs to know of them (`SiteRules`); it checks a module, places an edit on
it and takes it off again. Every hook belongs to one. A port of one's own is a file with a type of sites, a capability
that methods have, and a class; `register_port` makes it known to plans and to `attach`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.errors import AttachError, SmidgenError
from smidgen.planning.entry import Entry
from smidgen.planning.site_rules import RULES, SiteRules, register_rules
from smidgen.ports.edit import Edit
from smidgen.sites.site import Site


class Port(SiteRules, ABC):
    """Base of all ports: how sites of some types are found, and edits there are checked, placed, removed and folded.

    One object serves all models; `register_port` makes it known. An edit stands at
    `model.get_submodule(site.path).edits[key]`, in an `Edits`; it has tensors that are trained and is switched by its
    `enabled`, which the port's hooks read at every call.

    Class attributes:
        edit: the class of its edits.
    """

    edit: ClassVar[type[Edit]] = Edit

    @abstractmethod
    def check(self, model: nn.Module, entry: Entry) -> None:
        """Raise AttachError, before anything is touched, if an edit cannot be placed."""

    @abstractmethod
    def place(self, model: nn.Module, site: Site, key: str, edit: Edit) -> list[RemovableHandle]:
        """Put an edit on its module, behind those that are there; gives the hooks that `remove` does not take away."""

    @abstractmethod
    def remove(self, model: nn.Module, site: Site) -> None:
        """Take all edits off a site's module, and whatever else `place` left; nothing where there are none."""

    def folded(self, model: nn.Module, path: str) -> dict[str, Tensor]:
        """Name -> value, with gradient, of the base's tensors with all edits at a module folded in.

        Asked only where every method is mergeable (`Method.unmergeable`).
        """
        raise AttachError(f"{type(self).__name__} folds nothing into the weights")

    def why_no_rows(self, edit: Edit) -> str | None:
        """Why the rows of one batch cannot have different tensors of an edit, in a few words; None if they can.

        They can where an edit's tensors come in by `Edit.by_row` alone.
        """
        return "its port has no form by row"

    def place_layout(self, model: nn.Module, site: Site, layout: str, key: str, edit: Edit) -> list[RemovableHandle]:
        """Put an edit on its module that acts on those rows of mixed batches that have its layout (`RowBlock`).

        Several layouts stand beside each other. Asked only where `why_no_rows` names nothing; gives the hooks that
        `remove_layout` does not take away.
        """
        raise AttachError(f"{type(self).__name__} has no form by row")

    def remove_layout(self, model: nn.Module, site: Site, layout: str) -> None:
        """Take a layout's edits off a site's module; nothing where there are none."""


PORTS: dict[type[Site], Port] = {}


def register_port(port: Port) -> None:
    """Make a port known: plans look for its sites, `attach` places edits there.

    Raises:
        SmidgenError: a type of its sites has a port already.
    """
    for cls in port.sites:
        if cls in PORTS:
            raise SmidgenError(
                f"sites of the type {cls.__name__} have a port already, {type(PORTS[cls]).__name__}; give "
                f"{type(port).__name__} a type of its own"
            )
    for cls in port.sites:
        PORTS[cls] = port
    if not any(cls in RULES for cls in port.sites):
        register_rules(port)


def forget_port(port: Port) -> None:
    """The inverse of `register_port`."""
    for cls in port.sites:
        if PORTS.get(cls) is port:
            del PORTS[cls]
        if RULES.get(cls) is port:
            del RULES[cls]


def port_of(site: Site) -> Port:
    """The port of a site's type, or of the nearest type above that has one.

    Raises:
        SmidgenError: there is none.
    """
    for cls in type(site).__mro__:
        if cls in PORTS:
            return PORTS[cls]
    raise SmidgenError(f"sites of the type {type(site).__name__} have no port; register one with smidgen.register_port")
