"""A float32 master as its base stores it, for whoever asks from afar: rounded only when its values are used.

Models ask deep down for a dtype (of the first map, of the first parameter there is) and cast to it, and a few use a
weight far from its module (a decoder that shares the table of its inputs). Rounding every master for the length of the
model's call would hold a second copy of the base; a view costs nothing until it enters an operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from smidgen.ports.in_place.sparse_values import composed, own_tensor

# what is asked of a tensor without its values
ASKED = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.element_size, Tensor.get_device),
    *(Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.numel, Tensor.__len__),
}

DATA = Tensor.data.__get__  # type: ignore[attr-defined]
HIDDEN = (
    "{what} was given a trained tensor of a low-precision base far from the tensor's own module, in a way that hides "
    "its float32 values; load the base in float32, or leave this tensor out of the recipe"
)


class MasterModule(nn.Module):
    """A module of a low-precision base in which masters stand, and how the base stores each of them."""

    _stored_dtypes: Mapping[str, torch.dtype]
    _casting: bool


def casts(module: nn.Module) -> TypeGuard[MasterModule]:
    """Whether masters stand in a module now."""
    return bool(getattr(module, "_casting", False))


def rounded(module: MasterModule, term: str) -> Tensor:
    """A module's tensor as its base stores it: chosen values put in, in the stored dtype."""
    return composed(module, term).to(module._stored_dtypes[term])


class StoredView(Tensor):
    """Shape, device and stored dtype of a master; any operation sees it rounded, with gradient."""

    module: MasterModule
    term: str

    @staticmethod
    def of(module: MasterModule, term: str) -> StoredView:
        """The view of a module's master."""
        master, dtype = own_tensor(module, term), module._stored_dtypes[term]
        found: StoredView = Tensor._make_wrapper_subclass(
            StoredView,
            master.shape,
            master.stride(),
            dtype=dtype,
            device=master.device,
            requires_grad=master.requires_grad,
        )
        found.module, found.term = module, term
        if master.requires_grad:
            with torch._C.DisableTorchFunctionSubclass():
                found.register_hook(_refuse)
        return found

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Answer what is asked about the tensor, and round for the rest; `.data` is the master's, to be written to."""
        if func in ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func == DATA:
            view = args[0]
            assert isinstance(view, StoredView)
            return own_tensor(view.module, view.term).data
        args, kwargs = tree_map_only(StoredView, lambda view: rounded(view.module, view.term), (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: object, types: object, args: object = (), kwargs: object = None
    ) -> None:
        """What comes here passed by `__torch_function__`, and would see no values."""
        raise TypeError(HIDDEN.format(what=func))


def _refuse(gradient: Tensor) -> None:
    """Hook of a view: a gradient that comes here does not come to the master."""
    raise TypeError(HIDDEN.format(what="a function with a backward of its own"))


def as_stored(module: nn.Module, recurse: bool = True) -> Iterator[Tensor]:
    """Stands in for `parameters` of a model during its call: masters as their base stores them."""
    parameters: Callable[..., Iterator[tuple[str, nn.Parameter]]] = type(module).named_parameters
    for name, parameter in parameters(module, recurse=recurse):
        path, _, term = name.rpartition(".")
        owner = module.get_submodule(path)
        yield StoredView.of(owner, term) if casts(owner) and term in owner._stored_dtypes else parameter
