"""The module port: edits of what enters and leaves a module."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.errors import AttachError
from smidgen.common.hook_types import Args
from smidgen.methods.capabilities import ReadsWeight
from smidgen.planning.entry import Entry
from smidgen.planning.rules.modules import ModuleRules
from smidgen.ports.base import Port
from smidgen.ports.by_row.module_layouts import add_layout, drop_layout
from smidgen.ports.edit import Edit, Edits, drop_edits, edits_of
from smidgen.ports.forward_state import state
from smidgen.ports.in_place.attached_weights import live
from smidgen.ports.module_edits import ModuleEdit, ModuleEdits, add_edit, check_editable, fold
from smidgen.sites.site import Site


class ModulePort(ModuleRules, Port):
    """Linear maps, convolutions, norms, embeddings as tables, and what else is called with one tensor."""

    edit = ModuleEdit

    def check(self, model: nn.Module, entry: Entry) -> None:
        """Raises AttachError if the module cannot carry edits."""
        check_editable(model.get_submodule(entry.site.path), entry.site)

    def place(self, model: nn.Module, site: Site, key: str, edit: Edit) -> list[RemovableHandle]:
        """At the site's module."""
        add_edit(model.get_submodule(site.path), key, edit)
        return []

    def remove(self, model: nn.Module, site: Site) -> None:
        """Take all edits and their hooks off the module."""
        drop_edits(model.get_submodule(site.path))

    def folded(self, model: nn.Module, path: str) -> dict[str, Tensor]:
        """Weight and bias, in master precision."""
        return folded_module(model, path)

    def why_no_rows(self, edit: Edit) -> str | None:
        """None where a formula reads the site's own tensors, its input and its output."""
        return why_no_module_rows(edit)

    def place_layout(self, model: nn.Module, site: Site, layout: str, key: str, edit: Edit) -> list[RemovableHandle]:
        """At the site's module."""
        add_layout(model.get_submodule(site.path), layout, key, edit)
        return []

    def remove_layout(self, model: nn.Module, site: Site, layout: str) -> None:
        """Take a layout's edits off the module."""
        drop_layout(model.get_submodule(site.path), layout)


def folded_module(model: nn.Module, path: str) -> dict[str, Tensor]:
    """Name -> value in master precision of a module's weight and bias, its edits folded in."""
    module = model.get_submodule(path)
    edits = edits_of(module, ModuleEdits)
    assert edits is not None
    weight, bias = live(module)
    for edit in edits.all():
        weight, bias = fold(edit, weight, bias)
    return {f"{path}.weight": weight} | ({} if bias is None else {f"{path}.bias": bias})


def why_no_module_rows(edit: Edit) -> str | None:
    """Why an edit of what enters or leaves a module has no form by row."""
    if isinstance(edit.method, ReadsWeight):
        return "it reads the weight, with what stands before it folded in"
    if edit.pool:
        return "its sites share tensors"
    return None


def add_guard(owner: nn.Module, name: str) -> list[RemovableHandle]:
    """Let a module that reads its child's tensors on some ways say so when it takes one of them."""
    handles = [owner.get_submodule(name).register_forward_hook(note_call)]
    if "_guarded" not in owner.__dict__:
        owner.__dict__["_guarded"] = ()
        handles += [owner.register_forward_pre_hook(expect_calls), owner.register_forward_hook(check_calls)]
    owner.__dict__["_guarded"] += (name,)
    return handles


def drop_guard(owner: nn.Module) -> None:
    """Take away what `add_guard` left on the owner, its hooks apart."""
    owner.__dict__.pop("_guarded", None)


def note_call(module: nn.Module, args: Args, output: object) -> None:
    """Forward hook of a guarded child."""
    state().called[module] = True


class GuardedModule(nn.Module):
    """The owner of guarded children, whose names it has."""

    _guarded: tuple[str, ...]


def expect_calls(module: GuardedModule, args: Args) -> None:
    """Forward pre-hook of the owner of guarded children."""
    for name in module._guarded:
        child = module._modules[name]
        assert child is not None
        state().called[child] = False


def check_calls(module: GuardedModule, args: Args, output: object) -> None:
    """Forward hook of the owner: each child that has edits in use was called, or they did not act."""
    for name in module._guarded:
        child = module._modules[name]
        assert child is not None
        edits = child.edits
        assert isinstance(edits, Edits)
        if not state().called.get(child) and any(edit.enabled for edit in edits.all()):
            raise AttachError(
                f"{type(module).__name__} read the weight of its {name} without calling it (as a fused kernel does), "
                f"so {edits.all()[0].method} did not act; leave {name} out, or run without the kernel"
            )
