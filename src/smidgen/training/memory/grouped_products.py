"""The product of experts, computed and counted for tensors without content.

torch runs it in every dtype, but works out its shapes for bfloat16 alone, and counts no FLOPs for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

OPERATOR = getattr(torch.ops.aten, "_grouped_mm", None)  # torch 2.8 and later


class Grouped(TorchDispatchMode):
    """Inside, a product of experts gives a tensor of the right shape; what is in it means nothing."""

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[Any] = (),  # those of func
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        """Run an operator, or make what it would give."""
        if OPERATOR is None or func is not OPERATOR.default:
            return func(*args, **(kwargs or {}))
        offsets = args[2] if len(args) > 2 else (kwargs or {}).get("offs")
        return args[0].new_empty(_shape(args[0], args[1], offsets))


def _shape(a: Tensor, b: Tensor, offsets: Tensor | None) -> tuple[int, ...]:
    """Of a product of rows by experts (2-D by 3-D), of gradients of the experts (2-D by 2-D), and the rarer two."""
    rows, columns = a.shape[-2], b.shape[-1]
    if a.dim() == 2 and b.dim() == 2 and offsets is not None:
        return len(offsets), rows, columns
    return (a.shape[0], rows, columns) if a.dim() == b.dim() == 3 else (rows, columns)


def flops(a_shape: Sequence[int], b_shape: Sequence[int], *args: object, **kwargs: object) -> int:
    """FLOPs of it, for torch's counter: each row meets the weight of one expert."""
    groups = a_shape[0] if len(a_shape) == len(b_shape) == 3 else 1
    return 2 * groups * a_shape[-2] * a_shape[-1] * b_shape[-1]
