"""Dropout on a CPU at a fifth of the time: the same distribution, drawn 64 bits at a time.

torch draws every element of a dropout mask by itself; in a small model on a CPU that takes a sixth of a training step.
Here 16 bits of the same generator decide on an element, so that the share p is kept to 1 / 65,536, and the scale is
that of the share which is really kept. Which elements fall is another draw than torch's; what is expected is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LEVELS = 1 << 16


class FastDropout(TorchFunctionMode):
    """Inside, `F.dropout` (and so nn.Dropout) and attention with dropout draw their masks faster on a CPU."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        return func(*args, **kwargs) if handler is None else handler(*args, **kwargs)


def kept(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """A mask of ones (int8) with a share p of zeros, and the scale that keeps the expectation. CPU only."""
    zeros = min(max(round(p * _LEVELS), 0), _LEVELS - 1)
    count = shape.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    mask = bits.view(torch.int16)[:count].view(shape).ge_(zeros - _LEVELS // 2)
    return mask.to(torch.int8), _LEVELS / (_LEVELS - zeros)


class _Context(Protocol):
    """What torch keeps of a call for its backward pass."""

    scale: float
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class Dropped(torch.autograd.Function):
    """x * mask * scale; one byte per element is kept for the backward pass, as in torch."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, p: float) -> Tensor:
        """x: any shape on a CPU."""
        mask, ctx.scale = kept(x.shape, p)
        ctx.save_for_backward(mask)
        return mask.to(x.dtype).mul_(ctx.scale).mul_(x)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None]:
        """The same mask on the gradient."""
        (mask,) = ctx.saved_tensors
        return mask.to(gradients[0].dtype).mul_(ctx.scale).mul_(gradients[0]), None


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not 0 < p < 1 or inplace or x.device.type != "cpu" or not x.is_floating_point():
        return F.dropout(x, p, training, inplace)
    dropped: Tensor = Dropped.apply(x, p)
    return dropped


def _attention(  # noqa: PLR0913 - torch's own signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention with dropout, step by step: on a CPU torch has no fused kernel for it either.

    A row whose keys are all masked, which is padding, attends to all of them here and to none in torch.
    """
    if dropout_p == 0 or query.device.type != "cpu" or enable_gqa or is_causal:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scores = (query * (scale or query.shape[-1] ** -0.5)) @ key.transpose(-2, -1)  # (B, H, T, S)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    share = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return _dropout(share.to(scores.dtype), dropout_p) @ value


_HANDLERS: dict[Callable[..., object], Callable[..., Tensor]] = {
    F.dropout: _dropout,
    F.scaled_dot_product_attention: _attention,
}
