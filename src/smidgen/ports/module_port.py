"""The module port: edits of what enters and leaves a module, one hook function for all of them.

An edit of a sublayer stands at the module that the sublayer is left by; a tap brings it what entered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.errors import AttachError
from smidgen.common.hook_types import Args, first_of, like
from smidgen.methods.base import Method
from smidgen.methods.capabilities import EditsInput, EditsOutput, Merges, ReadsWeight, Tensors
from smidgen.planning.row import Row
from smidgen.planning.rules.modules import ModuleRules
from smidgen.ports.base import Port
from smidgen.ports.edit import Edit, Edits, drop_edits, edits_at
from smidgen.ports.forward_state import state
from smidgen.ports.in_place.attached_weights import live
from smidgen.ports.tap import entered
from smidgen.sites.site import Site, Sublayer
from smidgen.sites.weight_view import Pair, channels_back, channels_last, overlap, put_back, seen_from


class ModuleEdit(Edit):
    """What one method adds to what enters and leaves a module."""

    def __init__(
        self, method: Method, site: Site, tensors: Mapping[str, Tensor], chosen: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(method, site, tensors, chosen)
        # asked once: a protocol is slow to ask, and torch.compile need not trace it
        self.input = method if isinstance(method, EditsInput) else None
        self.output = method if isinstance(method, EditsOutput) else None
        self.weight_reader = method if isinstance(method, ReadsWeight) else None
        self.spans = isinstance(site, Sublayer)
        self.reads_entry = self.spans and method.reads_entry(site)

    @property
    def reads_base(self) -> bool:
        """Whether its formula reads the module's own weight."""
        return self.weight_reader is not None

    def before(self, x: Tensor) -> Tensor:
        """The edited input, in the dtype of x."""
        if self.input is None:
            return x
        return self.by_row(self.input_formula, x.dtype, x)

    def input_formula(self, p: Tensors, x: Tensor) -> Tensor:
        """`before` of the given tensors, a pure function."""
        assert self.input is not None
        found = self.input.before(p, channels_last(self.site, x), self.site)
        return channels_back(self.site, found.to(x.dtype))

    def after(self, x: Tensor, y: Tensor, base: Tensors | None = None) -> Tensor:
        """The edited output, in the dtype of y; only the site's rows of a fused projection change."""
        if self.output is None and self.weight_reader is None:
            return y
        # what enters may be narrower than what leaves: T5 keeps the last map of its feed-forward part in float32
        x = x.to(y.dtype) if x.is_floating_point() else x
        p = self.method.input_dropout() if x.is_floating_point() else 0.0  # not of the numbers of rows
        x = F.dropout(x, p) if p and self.training else x
        return self.by_row(lambda p, x, y: self.formula(p, x, y, base), y.dtype, x, y)

    def formula(self, p: Tensors, x: Tensor, y: Tensor, base: Tensors | None) -> Tensor:
        """`after` of the given tensors, a pure function."""
        x, y = channels_last(self.site, x), channels_last(self.site, y)
        rows = self.site.rows
        part = y if rows is None else rows.take(y, -1)
        if self.weight_reader is not None:
            found = self.weight_reader.after_with(p, x, part, base or {}, self.site)
        else:
            assert self.output is not None
            found = self.output.after(p, x, part, self.site)
        found = found.to(y.dtype)
        return channels_back(self.site, found if rows is None else rows.put(y, found, -1))


class ModuleEdits(Edits):
    """All edits at one module; a later one wraps the earlier ones, in the way `merge` folds them."""


def run_before(module: Any, args: Args) -> Args:
    """Forward pre-hook: the outermost edit (the last one) sees the input first."""
    edits = module.edits
    if not args:
        raise AttachError(f"{type(module).__name__} was called without a positional input; its edits need one")
    x, inputs = args[0], []
    for edit in reversed(list(edits.values())):
        inputs.append(x)
        x = edit.before(x) if edit.enabled else x
    state().inputs[edits] = inputs[::-1]
    return (x, *args[1:])


def run_after(module: Any, args: Args, output: object) -> object:
    """Forward hook: each edit sees the input that came to its own level, or that entered the sublayer.

    Of a tuple, as modules with a router give, the first entry is the output.
    """
    edits = module.edits
    inputs = state().inputs.pop(edits, None)
    y, rest = first_of(output)
    came = entered(module, y) if "tap" in module._modules else None
    for level, edit in enumerate(edits.values()):
        if edit.enabled:
            x = inputs[level] if inputs else args[0]
            if edit.spans:
                x = y if came is None else came
            y = edit.after(x, y, base_below(module, level) if edit.reads_base else None)
    return like(output, y, rest)


def base_below(module: Any, level: int) -> Tensors:
    """What an edit sees of its module's own tensors, with the edits before it folded in.

    The weight carries no gradient. The bias does: what takes it off the output would else scale its gradient.
    """
    *below, edit = list(module.edits.values())[: level + 1]
    weight, bias = live(module)
    for other in below:
        if other.enabled and overlap(other.site, edit.site):
            weight, bias = fold(other, weight, bias)
    seen = seen_from(edit.site, weight, bias)
    return {**seen, "weight": seen["weight"].detach()}


def fold(edit: Edit, weight: Tensor, bias: Tensor | None) -> Pair:
    """One edit folded into a module's tensors; the method sees (width_out, width_in) and its own rows."""
    site, p = edit.site, edit.tensors()
    seen = seen_from(site, weight, bias)
    assert isinstance(edit.method, Merges)  # or `unmergeable` has said so
    part = edit.method.merge(p, seen["weight"], seen.get("bias"), site)
    if bias is None and part[1] is not None:
        raise AttachError(f"{edit.method} needs a bias at {site.name}, which has none; keep it attached")
    return put_back(site, (weight, bias), part)


class ModulePort(ModuleRules, Port):
    """Linear maps, convolutions, norms, embeddings as tables, and what else is called with one tensor."""

    edit = ModuleEdit

    def check(self, model: nn.Module, row: Row) -> None:
        """Raises AttachError if the module cannot carry edits."""
        check_editable(model.get_submodule(row.site.path), row.site)

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


def folded_module(model: nn.Module, path: str) -> dict[str, Tensor]:
    """Name -> value in master precision of a module's weight and bias, its edits folded in."""
    module: Any = model.get_submodule(path)
    weight, bias = live(module)
    for edit in module.edits.values():
        weight, bias = fold(edit, weight, bias)
    return {f"{path}.weight": weight} | ({} if bias is None else {f"{path}.bias": bias})


def why_no_module_rows(edit: Edit) -> str | None:
    """Why an edit of what enters or leaves a module has no form by row."""
    if isinstance(edit.method, ReadsWeight):
        return "it reads the weight, with what stands before it folded in"
    if edit.pool:
        return "its sites share tensors"
    return None


def check_editable(module: Any, site: Site) -> None:
    """Raises AttachError, before anything is touched, if a module cannot carry edits."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise AttachError(f"{site.name} belongs to nn.MultiheadAttention, which never calls it: hooks cannot reach it")
    if hasattr(module, "edits") and not edits_at(module, ModuleEdits):
        raise AttachError(f"{type(module).__name__} at {site.name} already has an attribute 'edits'")


def add_edit(module: Any, key: str, edit: Edit) -> None:
    """Put an edit on a module, behind those that are there, and place the hooks once."""
    if not edits_at(module, ModuleEdits):
        module.add_module("edits", ModuleEdits())
        module._edit_handles = [module.register_forward_hook(run_after)]
    if isinstance(edit.method, EditsInput) and len(module._edit_handles) == 1:
        module._edit_handles.append(module.register_forward_pre_hook(run_before))
    edit.train(module.training)
    module.edits[key] = edit


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


def note_call(module: Any, args: Args, output: object) -> None:
    """Forward hook of a guarded child."""
    state().called[module] = True


def expect_calls(module: Any, args: Args) -> None:
    """Forward pre-hook of the owner of guarded children."""
    for name in module._guarded:
        state().called[module._modules[name]] = False


def check_calls(module: Any, args: Args, output: object) -> None:
    """Forward hook of the owner: each child that has edits in use was called, or they did not act."""
    for name in module._guarded:
        child = module._modules[name]
        edits = child.edits
        if not state().called.get(child) and any(edit.enabled for edit in edits.values()):
            raise AttachError(
                f"{type(module).__name__} read the weight of its {name} without calling it (as a fused kernel does), "
                f"so {next(iter(edits.values())).method} did not act; leave {name} out, or run without the kernel"
            )
