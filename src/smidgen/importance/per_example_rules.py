"""Squared per-example gradients of a module's parameters, from its inputs and the gradients at its outputs.

The batch comes first in every tensor: x (B, ..., width_in), g (B, ..., width_out). A module that is called several
times has its gradients added up per example before they are squared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from smidgen.sites.module_kinds import channel_axis
from smidgen.sites.module_probe import acts_as_bias

Tensors = dict[str, Tensor]
CACHE_BYTES = 2 * 2**20  # products of this size are squared before they leave a core's cache


@dataclass(frozen=True)
class Call:
    """One call of a module in a batch.

    Attributes:
        module: what was called.
        function: (parameters, *inputs) -> output, pure.
        inputs: tensors led by the batch; the first one is the module's input.
        g: gradient of the batch's summed log-probability at the output.
    """

    module: nn.Module
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    g: Tensor | None = None


Rule = Callable[[Mapping[str, Tensor], Sequence[Call], int], Tensors]


def norm(p: Mapping[str, Tensor], calls: Sequence[Call], limit: int) -> Tensors:
    """Bias: sum over tokens of g. Gain: of g * x_hat, where x_hat is what the module itself makes of a gain of one."""
    bias = next((term for term in p if acts_as_bias(term)), None)
    gain = next((term for term in p if term != bias), None)
    found: Tensors = {}
    if bias is not None:
        found[bias] = _squared([_tokens(_g(call, p), call.module, p[bias]).sum(1) for call in calls])
    if gain is not None:
        parts = ((_g(call, p) * _normalised(call, p[gain]), call.module) for call in calls)
        found[gain] = _squared([_tokens(part, module, p[gain]).sum(1) for part, module in parts])
    return found


def linear(p: Mapping[str, Tensor], calls: Sequence[Call], limit: int) -> Tensors:
    """Weight: sum over tokens of g x^T, stored (out, in), or (in, out) by a Conv1D. Bias: sum of g."""
    flat = [(_flat(_g(call, p)), _flat(call.inputs[0].to(_g(call, p).dtype))) for call in calls]
    found: Tensors = {}
    for term, tensor in p.items():
        if tensor.ndim == 1:
            found[term] = _squared([g.sum(1) for g, _ in flat])
        else:
            g, x = (torch.cat(parts, 1) if len(flat) > 1 else parts[0] for parts in zip(*flat, strict=True))
            transposed = not isinstance(calls[0].module, nn.Linear)
            found[term] = outer_squares(x, g, limit) if transposed else outer_squares(g, x, limit)
    return found


def embedding(p: Mapping[str, Tensor], calls: Sequence[Call], limit: int) -> Tensors:
    """Rows: sum of g over the tokens with that id, example by example."""
    ((term, table),) = p.items()
    rows, width = table.shape
    ids = torch.cat([call.inputs[0].flatten(1) for call in calls], 1)  # (B, T)
    g = torch.cat([_g(call, p).reshape(len(ids), -1, width) for call in calls], 1)
    places = ids + rows * torch.arange(len(ids), device=ids.device)[:, None]
    padding = cast(nn.Embedding, calls[0].module).padding_idx
    kept = ids != (-1 if padding is None else padding)
    unique, inverse = places[kept].unique(return_inverse=True)
    sums = g.new_zeros(len(unique), width).index_add_(0, inverse, g[kept])
    return {term: g.new_zeros(rows, width).index_add_(0, unique % rows, sums.square_())}


def general(p: Mapping[str, Tensor], calls: Sequence[Call], limit: int) -> Tensors:
    """Any pure function of the parameters: vjp for each example, vectorised over as many as `limit` bytes allow."""
    size = sum(t.numel() * t.element_size() for t in p.values())
    count, step = len(calls[0].inputs[0]), max(1, limit // size)
    found = {term: torch.zeros_like(tensor) for term, tensor in p.items()}
    for start in range(0, count, step):
        part = slice(start, start + step)
        grads = [_pull(call, p, part) for call in calls]
        for term, total in found.items():
            total += _squared([grad[term] for grad in grads])
    return found


RULES: dict[str, Rule] = {"norm": norm, "linear": linear, "embedding": embedding}


def outer_squares(a: Tensor, b: Tensor, limit: int) -> Tensor:
    """Sum over examples of (a_i^T b_i)^2, with at most `limit` bytes beside the result.

    a: (B, T, m), b: (B, T, n) -> (m, n)
    """
    (count, tokens, m), n = a.shape, b.shape[-1]
    if tokens == 1:
        return a[:, 0].square().T @ b[:, 0].square()
    total, row_bytes = a.new_zeros(m, n), n * a.element_size()
    limit = min(limit, CACHE_BYTES) if a.device.type == "cpu" else limit
    step = max(1, limit // (m * row_bytes))
    rows = -(-m // -(-m * row_bytes // max(limit, row_bytes)))  # as even as they come
    for start in range(0, count, step):
        x, y = a[start : start + step], b[start : start + step]
        for row in range(0, m, rows):
            product = torch.bmm(x[..., row : row + rows].transpose(1, 2), y)  # (step, rows, n)
            part = total[row : row + rows]
            if len(product) == 1:
                part.addcmul_(product[0], product[0])
            else:
                part += product.square_().sum(0)
    return total


def _pull(call: Call, p: Mapping[str, Tensor], part: slice) -> Tensors:
    """Gradients (step, *shape) of each parameter."""

    def one(inputs: tuple[Tensor, ...], g: Tensor) -> Tensors:
        pull = vjp(lambda q: call.function(q, *(x[None] for x in inputs)), dict(p))[1]
        grads: Tensors = pull(g[None])[0]
        return grads

    dtype = next(iter(p.values())).dtype
    inputs = tuple(x[part].to(dtype) if x.is_floating_point() else x[part] for x in call.inputs)
    return vmap(one)(inputs, _g(call, p)[part])


def _normalised(call: Call, gain: Tensor) -> Tensor:
    """The normalised input, from the module itself: f(gain 1, bias 0) - f(gain 0, bias 0), as (1 + gain) needs."""
    x = call.inputs[0].to(gain.dtype)
    terms = dict(call.module.named_parameters(recurse=False))
    zeros = {term: torch.zeros_like(tensor, dtype=gain.dtype) for term, tensor in terms.items()}
    ones = {t: zero if acts_as_bias(t) else torch.ones_like(zero) for t, zero in zeros.items()}
    with torch.no_grad():
        rest = call.function(zeros, x[:1])
        found = call.function(ones, x)
        return found - call.function(zeros, x) if rest.any() else found


def _tokens(t: Tensor, module: nn.Module, like: Tensor) -> Tensor:
    """(B, tokens, *width) of a norm's output, whose width lies last, or behind the batch; a norm by head has two."""
    return t.movedim(channel_axis(module), -1).reshape(len(t), -1, *like.shape)


def _flat(t: Tensor) -> Tensor:
    return t.reshape(len(t), -1, t.shape[-1])


def _g(call: Call, p: Mapping[str, Tensor]) -> Tensor:
    assert call.g is not None
    return call.g.to(next(iter(p.values())).dtype)


def _squared(parts: Sequence[Tensor]) -> Tensor:
    """Sum over examples of the squares of what several calls add up to. parts: (B, *shape) each."""
    total = sum(parts[1:], parts[0])
    return total.square().sum(0)
