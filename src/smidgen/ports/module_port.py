"""The ways to touch a model. A method never sees a port; it says which one by the functions that it defines.

Parameter port: a trained copy stands in `module._parameters` under the base tensor's own name.
Module port: one module-level hook function that reads `module.edits`, so that deepcopy, pickle, DataParallel
replicas and one compiled graph keep working and the base's state_dict names stay as they are. An edit of a sublayer
stands at the module that the sublayer is left by; a tap brings it what entered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.errors import AttachError
from smidgen.methods.base import Method, Tensors
from smidgen.ports.attached_weights import live
from smidgen.ports.sparse_values import SparseValues
from smidgen.ports.sublayer_port import _entered
from smidgen.sites.site import Site, Sublayer
from smidgen.sites.weight_view import Pair, channels_back, channels_last, overlap, put_back, seen_from


class Edit(nn.Module):
    """The tensors that one method adds at one site, named by the paper's symbols.

    A tensor of which a selection left some values is a buffer with its start and a `Part` with the values. What sites
    share belongs to an edit of its own, `pool`, which stands at the model and is called by nobody.
    """

    def __init__(
        self, method: Method, site: Site, tensors: Mapping[str, Tensor], chosen: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.method, self.site, self.enabled = method, site, True
        self.reads_base = method.overrides("after_with")
        self.spans = isinstance(site, Sublayer)
        self.reads_entry = self.spans and method.reads_entry(site)
        self.symbols, self.subsets = (*tensors, *(f"{s}0" for s in method.keeps)), nn.ModuleDict()
        self.pool: tuple[Edit, ...] = ()  # in a tuple, so that the pool is not registered here as well
        for symbol in method.keeps:
            self.register_buffer(f"{symbol}0", tensors[symbol].clone())
        for symbol, tensor in tensors.items():
            if chosen is None or symbol not in chosen:
                self.register_parameter(symbol, nn.Parameter(tensor))
                continue
            self.register_buffer(symbol, tensor)
            if len(chosen[symbol]):
                self.subsets[symbol] = SparseValues(tensor, chosen[symbol], tensor.dtype)

    def share(self, pool: Edit, routes: Mapping[str, Tensor]) -> None:
        """Use the tensors of a pool, by routes: symbol -> (n,) int64."""
        self.pool, self.symbols = (pool,), (*self.symbols, *routes)
        for symbol, index in routes.items():
            self.register_buffer(symbol, index)

    def tensors(self) -> dict[str, Tensor]:
        """Symbol -> whole tensor."""
        parts: Mapping[str, Any] = self.subsets._modules
        found = {symbol: getattr(self, symbol) for symbol in self.symbols}
        whole = {k: parts[k].whole(v) if k in parts else v for k, v in found.items()}
        return whole | self.pool[0].tensors() if self.pool else whole

    def leaf(self, symbol: str) -> nn.Parameter:
        """What is trained of a tensor: all of it, or the chosen values."""
        parts: Mapping[str, Any] = self.subsets._modules
        found: nn.Parameter = parts[symbol].values if symbol in parts else getattr(self, symbol)
        return found

    def cast(self, x: Tensor) -> dict[str, Tensor]:
        """Matrices enter a matrix product, so they take the activations' dtype; vectors stay masters."""
        return {k: v.to(x.dtype) if v.ndim > 1 else v for k, v in self.tensors().items()}

    def before(self, x: Tensor) -> Tensor:
        """The edited input, in the dtype of x."""
        found = self.method.before(self.cast(x), channels_last(self.site, x), self.site)
        return channels_back(self.site, found.to(x.dtype))

    def after(self, x: Tensor, y: Tensor, base: Tensors | None = None) -> Tensor:
        """The edited output, in the dtype of y; only the site's rows of a fused projection change."""
        # what enters may be narrower than what leaves: T5 keeps the last map of its feed-forward part in float32
        x = x.to(y.dtype) if x.is_floating_point() else x
        p = self.method.input_dropout() if x.is_floating_point() else 0.0  # not of the numbers of rows
        x = F.dropout(x, p) if p and self.training else x
        return self.formula(self.cast(y), x, y, base)

    def formula(self, p: Tensors, x: Tensor, y: Tensor, base: Tensors | None) -> Tensor:
        """`after` of the given tensors, a pure function."""
        x, y = channels_last(self.site, x), channels_last(self.site, y)
        rows = self.site.rows
        part = y if rows is None else rows.take(y, -1)
        if self.reads_base:
            found = self.method.after_with(p, x, part, base or {}, self.site)
        else:
            found = self.method.after(p, x, part, self.site)
        found = found.to(y.dtype)
        return channels_back(self.site, found if rows is None else rows.put(y, found, -1))

    def keys_values(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (heads, length, head_dim) and values (heads, length, value_dim), in the dtype of `key`."""
        k, v = self.method.keys_values(self.method.settle(self.tensors(), self.site), self.site)
        return k.to(key.dtype), v.to(key.dtype)

    def tokens(self, dtype: torch.dtype) -> Tensor:
        """Vectors (length, width)."""
        return self.method.tokens(self.method.settle(self.tensors(), self.site), self.site).to(dtype)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.method} at {self.site.name}"


class Edits(nn.ModuleDict):
    """All edits at one module, left to right; a later one wraps the earlier ones, in the way `merge` folds them."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] | None = None
        self.ran = False  # kept up only where the owner may read the module instead of calling it


def run_before(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook: the outermost edit (the last one) sees the input first."""
    edits = module.edits
    if not args:
        raise AttachError(f"{type(module).__name__} was called without a positional input; its edits need one")
    x, inputs = args[0], []
    for edit in reversed(list(edits.values())):
        inputs.append(x)
        x = edit.before(x) if edit.enabled else x
    edits.inputs = inputs[::-1]
    return (x, *args[1:])


def run_after(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: each edit sees the input that came to its own level, or that entered the sublayer.

    Of a tuple, as modules with a router give, the first entry is the output.
    """
    edits = module.edits
    inputs, edits.inputs = edits.inputs, None
    output, *rest = output if isinstance(output, tuple) else (output,)
    entered = _entered(module, output) if "tap" in module._modules else None
    for level, edit in enumerate(edits.values()):
        if edit.enabled:
            x = inputs[level] if inputs else args[0]
            if edit.spans:
                x = output if entered is None else entered
            output = edit.after(x, output, base_below(module, level) if edit.reads_base else None)
    return (output, *rest) if rest else output


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
    part = edit.method.merge(p, seen["weight"], seen.get("bias"), site)
    if bias is None and part[1] is not None:
        raise AttachError(f"{edit.method} needs a bias at {site.name}, which has none; keep it attached")
    return put_back(site, (weight, bias), part)


def check_pool(model: Any, sites: Sequence[Site], method: Method) -> None:
    """Raises AttachError, before anything is touched, if a model cannot own what these sites share."""
    if hasattr(model, "edits") or not all(site.path for site in sites):
        name = type(model).__name__
        raise AttachError(f"{method} shares tensors, but {name} cannot own them: it has edits of its own")


def check_editable(module: Any, site: Site, method: Method) -> None:
    """Raises AttachError, before anything is touched, if a module cannot carry edits of a method."""
    if isinstance(site, Sublayer) and method.overrides("before"):
        raise AttachError(f"{method} edits the input of the {site.kind} at {site.name}, which several maps share")
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise AttachError(f"{site.name} belongs to nn.MultiheadAttention, which never calls it: hooks cannot reach it")
    if hasattr(module, "edits") and not isinstance(module.edits, Edits):
        raise AttachError(f"{type(module).__name__} at {site.name} already has an attribute 'edits'")


def add_edit(module: Any, key: str, edit: Edit) -> None:
    """Put an edit on a module, behind those that are there, and place the hooks once."""
    if not isinstance(getattr(module, "edits", None), Edits):
        module.add_module("edits", Edits())
        module._edit_handles = [module.register_forward_hook(run_after)]
    if edit.method.overrides("before") and len(module._edit_handles) == 1:
        module._edit_handles.append(module.register_forward_pre_hook(run_before))
    edit.train(module.training)
    module.edits[key] = edit


def add_pool(model: Any, key: str, pool: Edit) -> None:
    """Put what sites share on the model itself, where no hook reads it."""
    if not isinstance(getattr(model, "edits", None), Edits):
        model.add_module("edits", Edits())
        model._edit_handles = []
    pool.train(model.training)
    model.edits[key] = pool


def add_guard(owner: Any, name: str) -> list[RemovableHandle]:
    """Let a module that reads its child's tensors on some ways say so when it takes one of them."""
    handles = [owner._modules[name].register_forward_hook(note_call)]
    if "_guarded" not in owner.__dict__:
        owner.__dict__["_guarded"] = ()
        handles += [owner.register_forward_pre_hook(expect_calls), owner.register_forward_hook(check_calls)]
    owner.__dict__["_guarded"] += (name,)
    return handles


def drop_guard(owner: Any) -> None:
    """Take away what `add_guard` left on the owner, its hooks apart."""
    owner.__dict__.pop("_guarded", None)


def note_call(module: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of a guarded child."""
    module.edits.ran = True


def expect_calls(module: Any, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of the owner of guarded children."""
    for name in module._guarded:
        module._modules[name].edits.ran = False


def check_calls(module: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of the owner: each child that has edits in use was called, or they did not act."""
    for name in module._guarded:
        edits = module._modules[name].edits
        if not edits.ran and any(edit.enabled for edit in edits.values()):
            raise AttachError(
                f"{type(module).__name__} read the weight of its {name} without calling it (as a fused kernel does), "
                f"so {next(iter(edits.values())).method} did not act; leave {name} out, or run without the kernel"
            )


def drop_edits(module: Any) -> None:
    """Take all edits and their hooks off a module."""
    for handle in module.__dict__.pop("_edit_handles"):
        handle.remove()
    del module._modules["edits"]
