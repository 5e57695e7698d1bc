"""The weight port: a weight that is read stands with what is added folded in, for as long as it is read.

    W + (W_merged - W)    by the method's own `merge`; of several stacked, each with tensors of its own

Composed weights stand in the instance's `__dict__`, which attribute look-up reads before `_parameters`, while the
module itself is called or the nearest one around it that is.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.dtypes import master_dtype
from smidgen.common.errors import AttachError
from smidgen.common.hook_types import Args
from smidgen.methods.capabilities import Merges
from smidgen.planning.entry import Entry
from smidgen.planning.rules.weights import WeightRules
from smidgen.ports.base import Port
from smidgen.ports.during_call import stand, stand_down
from smidgen.ports.edit import Edit, EditedModule, Edits, edits_at, edits_of, put_edit
from smidgen.ports.in_place.master_weights import CONTAINERS
from smidgen.ports.in_place.sparse_values import own_tensor
from smidgen.sites.site import Site, WeightSite

_LOCK = threading.Lock()  # threads see one `__dict__`: what stands there is taken away by the last to leave


class WeightEdit(Edit):
    """What one method adds to one weight, or to several stacked."""

    @property
    def term(self) -> str:
        """The weight's name."""
        assert isinstance(self.site, WeightSite)
        return self.site.term

    def folded(self, weight: Tensor) -> Tensor:
        """The weight with it, in the dtype of the weight.

        Raises:
            AttachError: the method gives a bias.
        """
        method, site = self.method, self.site
        assert isinstance(method, Merges)  # the plan has seen to it
        assert isinstance(site, WeightSite)

        def one(p: dict[str, Tensor], w: Tensor) -> Tensor:
            merged, bias = method.merge(p, w, None, site)
            if bias is not None:
                raise AttachError(f"{method} needs a bias at {site.name}, which has none")
            return merged

        each = torch.vmap(one) if site.count > 1 else one
        return each(self.tensors(), weight.to(master_dtype(weight.dtype))).to(weight.dtype)


class WeightEdits(Edits[WeightEdit]):
    """The edits at the weights of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.readers = 0  # calls under way in which the weights are read

    def composed(self, module: nn.Module) -> dict[str, Tensor]:
        """Name -> weight with all edits that are on, left to right."""
        found: dict[str, Tensor] = {}
        for edit in self.all():
            if edit.enabled:
                found[edit.term] = edit.folded(found.get(edit.term, own_tensor(module, edit.term)))
        return found


class WeightPort(WeightRules, Port):
    """Weights of experts, of nn.MultiheadAttention, of maps that are read."""

    edit = WeightEdit

    def check(self, model: nn.Module, entry: Entry) -> None:
        """Raises AttachError if the module has an attribute of the edits' name."""
        module = model.get_submodule(entry.site.path)
        if hasattr(module, "edits") and not edits_at(module, WeightEdits):
            raise AttachError(f"{type(module).__name__} at {entry.site.path} already has an attribute 'edits'")

    def place(self, model: nn.Module, site: Site, key: str, edit: Edit) -> list[RemovableHandle]:
        """At the module that owns the weight, with hooks there and at the nearest module around it that is called."""
        module = model.get_submodule(site.path)
        handles: list[RemovableHandle] = []
        if not edits_at(module, WeightEdits):
            module.add_module("edits", WeightEdits())
            for path in reading_modules(model, site.path):
                reader = model.get_submodule(path)
                if "_composes" not in reader.__dict__:
                    handles += stand(reader, compose_weights, drop_composed)
                reader.__dict__["_composes"] = (*reader.__dict__.get("_composes", ()), module)
        put_edit(module, key, edit)
        return handles

    def remove(self, model: nn.Module, site: Site) -> None:
        """Take all edits of the module away."""
        module = model.get_submodule(site.path)
        if not edits_at(module, WeightEdits):
            return
        del module._modules["edits"]
        for path in reading_modules(model, site.path):
            reader = model.get_submodule(path)
            if reader.__dict__.pop("_composes", None) is not None:
                stand_down(reader)

    def folded(self, model: nn.Module, path: str) -> dict[str, Tensor]:
        """The composed weights, by name."""
        module = model.get_submodule(path)
        edits = edits_of(module, WeightEdits)
        assert edits is not None
        return {f"{path}.{term}": weight for term, weight in edits.composed(module).items()}


def reading_modules(model: nn.Module, path: str) -> tuple[str, ...]:
    """Paths of a module and of the nearest one around it that is called."""
    outer = path.rpartition(".")[0]
    while outer and isinstance(model.get_submodule(outer), CONTAINERS):
        outer = outer.rpartition(".")[0]
    return (path, outer) if path else (path,)


class WeightReader(nn.Module):
    """A module that reads weights, and the modules that own them."""

    _composes: tuple[EditedModule[WeightEdits], ...]


def compose_weights(reader: WeightReader, args: Args) -> None:
    """Pre-hook of a module that reads weights: composed ones stand in the instance's `__dict__`, once for all readers.

    What a caller without gradient composed is composed again where a gradient is wanted.
    """
    with nullcontext() if torch.compiler.is_compiling() else _LOCK:
        for module in reader._composes:
            standing = any(edit.term in module.__dict__ for edit in module.edits.all())
            if not standing or torch.is_grad_enabled():
                module.__dict__.update(module.edits.composed(module))
            module.edits.readers += 1


def drop_composed(reader: WeightReader, args: Args, output: object) -> None:
    """Forward hook of it (always called): the last to leave takes them away."""
    with nullcontext() if torch.compiler.is_compiling() else _LOCK:
        owners: tuple[EditedModule[WeightEdits], ...] = reader.__dict__.get("_composes", ())
        for module in owners:
            module.edits.readers = max(module.edits.readers - 1, 0)
            if not module.edits.readers:
                for edit in module.edits.all():
                    module.__dict__.pop(edit.term, None)
