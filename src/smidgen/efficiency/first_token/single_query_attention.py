"""Attention of a single query per head: to keys and values that were made, or without making any.

With one query q of width n in a head, keys K = X W_k' and values V = X W_v' of all tokens X (T, d) are not needed:

    q K' = (q W_k) X'    and    a V = (a X) W_v'

so a token costs 4 d floating-point operations a head, where its key and value would cost 4 d n. The bias of the keys
adds one number to all scores of a head, which softmax does not see; that of the values counts as often as the shares
sum to (after dropout, not once).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen.common.errors import TrainError


def attend_once(  # noqa: PLR0913 - torch's own signature
    tokens: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **rest: object,
) -> Tensor:
    """Attention of one query per head (B, H, 1, n) to keys and values (B, T * H, 1, n): (B, H, 1, n).

    Written as sums over (B, T, H, n): as products of matrices, each would be one row.
    """
    if query.shape[2] != 1 or key.shape[2] != 1 or key.shape[1] != tokens * query.shape[1] or is_causal:
        raise TrainError("attention does not get the keys of one row")
    shape = (query.shape[0], tokens, *query.shape[1::2])
    wide = torch.promote_types(query.dtype, torch.float32)
    scaled = query.transpose(1, 2) * (scale or query.shape[-1] ** -0.5)  # (B, 1, H, n)
    scores = (key.reshape(shape) * scaled).sum(-1, dtype=wide).transpose(1, 2)  # (B, H, T)
    share = _shares(scores, attn_mask, dropout_p).transpose(1, 2)[..., None]  # (B, T, H, 1)
    return (share.to(value.dtype) * value.reshape(shape)).sum(1, dtype=wide).to(value.dtype)[:, :, None]


@dataclass(frozen=True, eq=False)
class Maps:
    """A block's maps to keys and to values, frozen, in float32 or wider.

    Attributes:
        key: (d_out, d).
        value: (d_out, d).
        bias: (d_out,) of the values.
    """

    key: Tensor
    value: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, key: nn.Module, value: nn.Module) -> Maps | None:
        """None if a call of them is more than a product with a frozen weight."""
        if key is value or not (_plain(key) and _plain(value)):
            return None
        wide = torch.promote_types(key.weight.dtype, torch.float32)
        bias = None if value.bias is None else value.bias.detach().to(wide)
        return cls(key.weight.detach().to(wide), value.weight.detach().to(wide), bias)

    def attend(
        self,
        rows: Tensor,
        query: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **rest: object,
    ) -> Tensor:
        """Attention of one query per head (B, H, 1, n) to tokens (B, T, d): (B, H, 1, n)."""
        heads, width = query.shape[1::2]
        if query.shape[2] != 1 or self.key.shape[0] != heads * width or is_causal:
            raise TrainError("attention does not get one query for each head of its keys")
        x = rows.to(self.key.dtype)
        q = query[:, :, 0].transpose(0, 1).to(x.dtype) * (scale or width**-0.5)  # (H, B, n)
        probe = (q @ self.key.view(heads, width, -1)).transpose(0, 1)  # (B, H, d)
        share = _shares(probe @ x.transpose(1, 2), attn_mask, dropout_p)  # (B, H, T)
        mixed = (share @ x).transpose(0, 1) @ self.value.view(heads, width, -1).transpose(1, 2)  # (H, B, n)
        if self.bias is not None:
            mixed = mixed + self.bias.view(heads, 1, width) * share.sum(-1).transpose(0, 1)[..., None]
        return mixed.transpose(0, 1)[:, :, None].to(query.dtype)


def _plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if type(module) is not nn.Linear or any(hooks) or "forward" in vars(module):
        return False
    return module.weight.is_floating_point() and not any(p.requires_grad for p in module.parameters())


def _shares(scores: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """Scores (B, H, T) in a wide dtype -> shares, dropped, of the same shape."""
    if mask is not None:
        mask = mask[..., 0, :]
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    return F.dropout(torch.softmax(scores, -1), dropout_p)


def check_unchanged(made: Sequence[Tensor], *read: Tensor) -> None:
    """Raises TrainError unless key and value (B, H, 1, n) are views of what the two maps made of one row (B, 1, d)."""
    if [(x.data_ptr(), x.numel()) for x in made] != [(x.data_ptr(), x.numel()) for x in read]:
        raise TrainError("attention does not get what its maps to keys and values made")
