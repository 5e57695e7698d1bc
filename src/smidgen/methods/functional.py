"""Mathematics that several methods share: pure functions, shapes stated."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from smidgen.sites.site import ConvSite

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": torch.nn.Identity(),
}


CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def convolve(x: Tensor, weight: Tensor, site: ConvSite) -> Tensor:
    """The convolution at a site, zeros in its padding, by another weight (outputs, width_in / groups, *kernel).

    x: (..., width_in, *places), the channels at `site.axis`; returns (..., outputs, *places).
    """
    how = {"stride": site.stride, "padding": site.padding, "dilation": site.dilation, "groups": site.groups}
    return CONVOLUTIONS[len(site.kernel)](x, weight, **how)


def kronecker_sum(left: Tensor, right: Tensor) -> Tensor:
    """sum_i left_i x right_i, x the Kronecker product.

    left: (n, a, b), right: (n, c, d); returns (a*c, b*d), with left's indices the outer ones.
    """
    _, a, b = left.shape
    return torch.einsum("nab,ncd->acbd", left, right).reshape(a * right.shape[1], b * right.shape[2])


def fan_in_uniform(rows: int, columns: int) -> Tensor:
    """(rows, columns), uniform in +-1/sqrt(columns), which is how torch starts a linear map."""
    bound = 1 / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-bound, bound)


def glorot(*shape: int, gain: float = 1.0) -> Tensor:
    """Uniform in +-gain * sqrt(6 / (rows + columns)), for stacked matrices (..., rows, columns).

    Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks, equation 16.
    """
    bound = gain * math.sqrt(6 / (shape[-2] + shape[-1]))
    return torch.empty(*shape).uniform_(-bound, bound)
