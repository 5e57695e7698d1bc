"""Subset port: the chosen values of a tensor are a leaf, put into the whole by index at every call.

Never a gradient mask: under weight decay or momentum, masked values drift.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.errors import AttachError
from smidgen.common.hook_types import Args
from smidgen.ports.during_call import stand, stand_down


class SparseValues(nn.Module):
    """The chosen values of one tensor, and where they belong.

    Shapes:
        values: (k,)   the leaf that is trained
        indices: (k,)  int64, into the flattened tensor
    """

    indices: Tensor

    def __init__(self, start: Tensor, indices: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.enabled = True
        self.register_buffer("indices", indices.to(start.device))
        self.values = nn.Parameter(start.detach().flatten()[self.indices].to(dtype))

    def whole(self, start: Tensor) -> Tensor:
        """The tensor `start` with the chosen values put in, in the dtype of `start`."""
        flat = start.detach().flatten().index_put((self.indices,), self.values.to(start.dtype))
        return flat.view(start.shape)


class PartedModule(nn.Module):
    """A module with parts, as its hooks see it: the parts by term, their hooks, and how many calls are under way."""

    subsets: nn.ModuleDict
    _subset_handles: list[RemovableHandle]
    _inside: int


def has_parts(module: nn.Module) -> TypeGuard[PartedModule]:
    """Whether chosen values of a module's tensors are trained."""
    return hasattr(module, "_subset_handles")


def parts_in(subsets: nn.ModuleDict) -> dict[str, SparseValues]:
    """Term -> its chosen values."""
    return cast("dict[str, SparseValues]", subsets._modules)


def own_tensor(module: nn.Module, term: str) -> nn.Parameter:
    """A module's parameter of a name that it has."""
    tensor = module._parameters[term]
    assert tensor is not None
    return tensor


_LOCK = threading.Lock()  # threads see one `__dict__`: what stands there is taken away by the last to leave


def compose(module: PartedModule, args: Args) -> None:
    """Forward pre-hook: whole tensors stand in the instance's `__dict__`, which look-up reads before `_parameters`."""
    with nullcontext() if torch.compiler.is_compiling() else _LOCK:
        for term, part in parts_in(module.subsets).items():
            if part.enabled:
                module.__dict__[term] = part.whole(own_tensor(module, term))
        module._inside = module.__dict__.get("_inside", 0) + 1


def clear(module: PartedModule, args: Args, output: object) -> None:
    """Forward hook (always called): take them away again."""
    with nullcontext() if torch.compiler.is_compiling() else _LOCK:
        module._inside = max(module.__dict__.get("_inside", 0) - 1, 0)
        if not module._inside:
            for term in module.subsets:
                module.__dict__.pop(term, None)


def composed(module: nn.Module, term: str) -> Tensor:
    """A module's tensor with its chosen values put in, if it has any that are in use."""
    tensor: Tensor = own_tensor(module, term)
    if not has_parts(module) or term not in module.subsets:
        return tensor
    part = parts_in(module.subsets)[term]
    return part.whole(tensor) if part.enabled else tensor


def current(module: nn.Module, term: str) -> Tensor:
    """A module's tensor with its chosen values put in, if it has any; with gradient to what of it is trained."""
    tensor: Tensor = own_tensor(module, term)
    if not has_parts(module) or term not in module.subsets:
        return tensor
    part = parts_in(module.subsets)[term]
    return part.whole(tensor.to(part.values.dtype))


def check_free(module: nn.Module, path: str) -> None:
    """Raises AttachError, before anything is touched, if a module cannot carry parts."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise AttachError(f"{path} belongs to nn.MultiheadAttention, which never calls it: no part can be trained")
    if hasattr(module, "subsets") and not has_parts(module):
        raise AttachError(f"{type(module).__name__} at {path} already has an attribute 'subsets'")


def add_part(module: nn.Module, term: str, part: SparseValues) -> None:
    """Put a part on a module, and place the hooks once."""
    if not has_parts(module):
        module.add_module("subsets", nn.ModuleDict())
        module.__dict__["_subset_handles"] = stand(module, compose, clear)
    assert has_parts(module)
    module.subsets[term] = part


def drop_parts(module: nn.Module) -> None:
    """Take all parts and their hooks off a module."""
    for handle in module.__dict__.pop("_subset_handles", ()):
        handle.remove()
    module.__dict__.pop("_inside", None)
    stand_down(module)
    module._modules.pop("subsets", None)
