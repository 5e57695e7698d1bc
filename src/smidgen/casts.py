"""float32 masters in a low-precision base: what enters and leaves their modules is cast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

LOW = (torch.bfloat16, torch.float16)
NATIVE = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def master_dtype(base: torch.dtype) -> torch.dtype:
    """dtype in which values are trained: float32, or float64 on a float64 base."""
    return torch.float64 if base == torch.float64 else torch.float32


def lift_norm(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Pre-hook of a norm of torch's own, whose kernels want input and terms in one dtype: compute in float32."""
    if not module._casting:
        return None
    module._input_dtype = args[0].dtype
    return (args[0].float(), *args[1:])


def lower_norm(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Forward hook of a norm with float32 terms in a low-precision base: back to the dtype that came in."""
    if not module._casting:
        return None
    dtype: torch.dtype = args[0].dtype
    if isinstance(module, NATIVE):
        dtype = module._input_dtype  # type: ignore[assignment]
    return output.to(dtype)


def lower_terms(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Pre-hook of any other module in a low-precision base: it computes with its masters rounded to the base's dtype.

    The rounded tensors stand in the instance's `__dict__`, which attribute look-up reads before `_parameters`.
    """
    if not module._casting:
        return None
    base = module._base_dtype
    for term in module._lowered_terms:
        module.__dict__[term] = module._parameters[term].to(base)
    return tuple(a.to(base) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def raise_terms(module: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook (always called): take the rounded tensors away again."""
    for term in module._lowered_terms:
        module.__dict__.pop(term, None)


def place_casts(module: Any, terms: tuple[str, ...], base: torch.dtype, norm: bool) -> None:
    """Hooks that let float32 masters stand in a module of a low-precision base."""
    handles: list[RemovableHandle]
    module._lowered_terms, module._base_dtype, module._casting = terms, base, True
    if norm:
        handles = [module.register_forward_hook(lower_norm)]
        if isinstance(module, NATIVE):
            handles.append(module.register_forward_pre_hook(lift_norm))
    else:
        handles = [
            module.register_forward_pre_hook(lower_terms),
            module.register_forward_hook(raise_terms, always_call=True),
        ]
    module._cast_handles = handles


def drop_casts(module: Any) -> None:
    """The inverse of `place_casts`."""
    for handle in module._cast_handles:
        handle.remove()
    for name in ("_cast_handles", "_casting", "_input_dtype", "_base_dtype", "_lowered_terms"):
        module.__dict__.pop(name, None)
