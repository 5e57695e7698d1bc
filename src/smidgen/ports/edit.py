"""The tensors that a method adds at one site, and the module that holds them.

They stand in `module.edits`, so that deepcopy, pickle, DataParallel replicas and one compiled graph keep working and
the base's state_dict names stay as they are. What is computed with them belongs to the port of the site.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from smidgen.methods.base import Method
from smidgen.ports.in_place.sparse_values import SparseValues
from smidgen.sites.site import Site


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

    def settled(self) -> dict[str, Tensor]:
        """The tensors that are saved of these (`Method.settle`)."""
        return self.method.settle(self.tensors(), self.site)

    def leaf(self, symbol: str) -> nn.Parameter:
        """What is trained of a tensor: all of it, or the chosen values."""
        parts: Mapping[str, Any] = self.subsets._modules
        found: nn.Parameter = parts[symbol].values if symbol in parts else getattr(self, symbol)
        return found

    def cast(self, x: Tensor) -> dict[str, Tensor]:
        """Matrices enter a matrix product, so they take the activations' dtype; vectors stay masters."""
        return {k: v.to(x.dtype) if v.ndim > 1 else v for k, v in self.tensors().items()}

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.method} at {self.site.name}"


class Edits(nn.ModuleDict):
    """All edits at one module, left to right."""


def edits_at(module: Any, cls: type[Edits] = Edits) -> bool:
    """Whether a module holds edits of this class."""
    return isinstance(getattr(module, "edits", None), cls)


def drop_edits(module: Any) -> None:
    """Take all edits and their hooks off a module, if it has any."""
    for handle in module.__dict__.pop("_edit_handles", ()):
        handle.remove()
    module._modules.pop("edits", None)
