"""Edits of what enters and leaves a module, and one hook function for all of them.

An edit of a sublayer stands at the module that the sublayer is left by; a tap brings it what entered.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.errors import AttachError
from smidgen.common.hook_types import Args, first_of, like
from smidgen.methods.base import Method
from smidgen.methods.capabilities import EditsInput, EditsOutput, Merges, ReadsWeight, Tensors
from smidgen.ports.edit import Edit, EditedModule, Edits, edits_at, give_edits, put_edit
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


class ModuleEdits(Edits[ModuleEdit]):
    """All edits at one module; a later one wraps the earlier ones, in the way `merge` folds them."""

    @property
    def reads_entry(self) -> bool:
        """Whether a formula reads what entered the sublayer."""
        return any(edit.reads_entry for edit in self.all())


def edited_input(edits: ModuleEdits, x: Tensor) -> Tensor:
    """The input, x, through all edits: the outermost (the last one) sees it first."""
    inputs = []
    for edit in reversed(edits.all()):
        inputs.append(x)
        x = edit.before(x) if edit.enabled else x
    state().inputs[edits] = inputs[::-1]
    return x


def edited_output(
    edits: ModuleEdits, y: Tensor, x: Tensor, came: Tensor | None, module: EditedModule[ModuleEdits] | None
) -> Tensor:
    """The output, y, through all edits: each sees the input that came to its own level, or entered the sublayer.

    Args:
        x: the module's input as it was called.
        came: what entered the sublayer, if a tap kept it.
        module: for edits that read its weight.
    """
    inputs = state().inputs.pop(edits, None)
    for level, edit in enumerate(edits.all()):
        if edit.enabled:
            seen = inputs[level] if inputs else x
            if edit.spans:
                seen = y if came is None else came
            y = edit.after(seen, y, _base_read(edit, module, level))
    return y


def _base_read(edit: ModuleEdit, module: EditedModule[ModuleEdits] | None, level: int) -> Tensors | None:
    if not edit.reads_base:
        return None
    assert module is not None  # no layout has an edit that reads it
    return base_below(module, level)


def run_before(module: EditedModule[ModuleEdits], args: Args) -> Args:
    """Forward pre-hook."""
    if not args:
        raise AttachError(f"{type(module).__name__} was called without a positional input; its edits need one")
    return (edited_input(module.edits, args[0]), *args[1:])


def run_after(module: EditedModule[ModuleEdits], args: Args, output: object) -> object:
    """Forward hook. Of a tuple, as modules with a router give, the first entry is the output."""
    edits = module.edits
    y, rest = first_of(output)
    came = entered(module, y) if "tap" in module._modules and edits.reads_entry else None
    return like(output, edited_output(edits, y, args[0], came, module), rest)


def base_below(module: EditedModule[ModuleEdits], level: int) -> Tensors:
    """What an edit sees of its module's own tensors, with the edits before it folded in.

    The weight carries no gradient. The bias does: what takes it off the output would else scale its gradient.
    """
    *below, edit = module.edits.all()[: level + 1]
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


def check_editable(module: nn.Module, site: Site) -> None:
    """Raises AttachError, before anything is touched, if a module cannot carry edits."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise AttachError(f"{site.name} belongs to nn.MultiheadAttention, which never calls it: hooks cannot reach it")
    if hasattr(module, "edits") and not edits_at(module, ModuleEdits):
        raise AttachError(f"{type(module).__name__} at {site.name} already has an attribute 'edits'")


def add_edit(module: nn.Module, key: str, edit: Edit) -> None:
    """Put an edit on a module, behind those that are there, and place the hooks once."""
    if not edits_at(module, ModuleEdits):
        give_edits(module, ModuleEdits(), module.register_forward_hook(run_after))
    handles: list[RemovableHandle] = module.__dict__["_edit_handles"]
    if isinstance(edit.method, EditsInput) and len(handles) == 1:
        handles.append(module.register_forward_pre_hook(run_before))
    put_edit(module, key, edit)
