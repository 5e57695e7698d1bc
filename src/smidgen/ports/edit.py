"""The tensors that a method adds at one site, and the module that holds them.

They stand in `module.edits`, so that deepcopy, pickle, DataParallel replicas and one compiled graph keep working and
the base's state_dict names stay as they are. What is computed with them belongs to the port of the site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.methods.base import Method
from smidgen.methods.capabilities import Tensors
from smidgen.ports.forward_state import state
from smidgen.ports.in_place.sparse_values import SparseValues, parts_in
from smidgen.sites.site import Site

Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor])


class Edit(nn.Module):
    """The tensors that one method adds at one site, named by the paper's symbols.

    A tensor of which a selection left some values is a buffer with its start and a `SparseValues` with the values. What
    sites share belongs to an edit of its own, `pool`, which stands at the model and is called by nobody.
    """

    def __init__(
        self, method: Method, site: Site, tensors: Mapping[str, Tensor], chosen: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.method, self.site, self.enabled = method, site, True
        self.symbols, self.subsets = (*tensors, *(f"{s}0" for s in method.keeps)), nn.ModuleDict()
        self.pool: tuple[Edit, ...] = ()  # in a tuple, so that the pool is not registered here as well
        self.saved_as = ""  # what stands before a symbol in a file, of edits whose tensors come row by row
        for symbol in method.keeps:
            self.register_buffer(f"{symbol}0", tensors[symbol].clone())
        for symbol, tensor in tensors.items():
            if chosen is None or symbol not in chosen:
                self.register_parameter(symbol, nn.Parameter(tensor))
                continue
            self.register_buffer(symbol, tensor)
            if len(chosen[symbol]):
                self.subsets[symbol] = SparseValues(tensor, chosen[symbol], tensor.dtype)

    def share(self, pool: Edit, shared_indices: Mapping[str, Tensor]) -> None:
        """Use the tensors of a pool, by its indices, symbol -> (n,) int64."""
        self.pool, self.symbols = (pool,), (*self.symbols, *shared_indices)
        for symbol, index in shared_indices.items():
            self.register_buffer(symbol, index)

    def tensors(self) -> dict[str, Tensor]:
        """Symbol -> whole tensor."""
        parts = parts_in(self.subsets)
        found = {symbol: getattr(self, symbol) for symbol in self.symbols}
        whole = {k: parts[k].whole(v) if k in parts else v for k, v in found.items()}
        return whole | self.pool[0].tensors() if self.pool else whole

    def settled(self) -> dict[str, Tensor]:
        """The tensors that are saved of these (`Method.settle`)."""
        return self.method.settle(self.tensors(), self.site)

    def leaf(self, symbol: str) -> nn.Parameter:
        """What is trained of a tensor: all of it, or the chosen values."""
        parts = parts_in(self.subsets)
        found: nn.Parameter = parts[symbol].values if symbol in parts else getattr(self, symbol)
        return found

    def cast(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Matrices enter a matrix product, so they take the activations' dtype; vectors stay masters."""
        return {k: _cast(v, dtype, v.ndim) for k, v in self.tensors().items()}

    def by_row(self, function: Callable[..., Result], dtype: torch.dtype, *inputs: Tensor) -> Result:
        """A function of this edit's tensors, matrices in a dtype, and of inputs (B, ...).

        On rows of a mixed batch it is called under `torch.vmap`, with a batch of one row and that row's tensors.
        """
        block = state().block
        if block is None:
            return function(self.cast(dtype), *inputs)
        found = {symbol: block.tables[self.saved_as + symbol] for symbol in self.symbols}
        each = {symbol: _cast(tensor, dtype, tensor.ndim - 1) for symbol, tensor in found.items()}

        def one(p: Tensors, *row: Tensor) -> Result:
            found = function(p, *(x[None] for x in row))
            return tuple(f[0] for f in found) if isinstance(found, tuple) else found[0]  # type: ignore[return-value]

        return torch.vmap(one)(each, *inputs)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.method} at {self.site.name}"


def _cast(tensor: Tensor, dtype: torch.dtype, ndim: int) -> Tensor:
    return tensor.to(dtype) if ndim > 1 else tensor


AnyEdit = TypeVar("AnyEdit", bound=Edit, covariant=True)


class Edits(nn.ModuleDict, Generic[AnyEdit]):
    """All edits at one module, left to right."""

    def all(self) -> list[AnyEdit]:
        """Left to right."""
        return cast("list[AnyEdit]", list(self.values()))


AnyEdits = TypeVar("AnyEdits", bound=Edits[Edit])


class EditedModule(nn.Module, Generic[AnyEdits]):
    """A module that carries edits, as its hooks see it."""

    edits: AnyEdits


def edits_of(module: nn.Module, cls: type[AnyEdits]) -> AnyEdits | None:
    """The edits that a module carries, if they are of this class."""
    edits = getattr(module, "edits", None)
    return edits if isinstance(edits, cls) else None


def edits_at(module: nn.Module, cls: type[Edits[Edit]] = Edits) -> bool:
    """Whether a module holds edits of this class."""
    return edits_of(module, cls) is not None


def give_edits(module: nn.Module, edits: Edits[Edit], *handles: RemovableHandle) -> None:
    """Let a module carry edits, with the hooks that `drop_edits` takes away."""
    module.add_module("edits", edits)
    module.__dict__["_edit_handles"] = list(handles)


def put_edit(module: nn.Module, key: str, edit: Edit) -> None:
    """Put an edit behind those that a module carries, in the module's mode."""
    edits = module.edits
    assert isinstance(edits, Edits)
    edits[key] = edit.train(module.training)


def drop_edits(module: nn.Module) -> None:
    """Take all edits and their hooks off a module, if it has any."""
    for handle in module.__dict__.pop("_edit_handles", ()):
        handle.remove()
    module._modules.pop("edits", None)
