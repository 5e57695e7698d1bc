"""A module's stored weight as its sites see it, and back: Conv1D stores the transpose, slices are runs of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smidgen.casts import master_dtype
from smidgen.sites import Site
from smidgen.subsets import current

Pair = tuple[Tensor, Tensor | None]


def stored(module: Any) -> Pair:
    """A module's weight and bias in master precision, chosen values put in, without gradient."""
    dtype = master_dtype(module._parameters["weight"].dtype)
    bias = module._parameters.get("bias")
    return current(module, "weight").to(dtype), None if bias is None else current(module, "bias").to(dtype)


def seen_from(site: Site, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """What a site sees of them: "weight" (width_out, width_in), "bias" (width_out,) if there is one."""
    oriented = weight.T if site.transposed else weight
    a, b = site.rows or (0, oriented.shape[0])
    return {"weight": oriented[a:b]} | ({} if bias is None else {"bias": bias[a:b]})


def put_back(site: Site, whole: Pair, part: Pair) -> Pair:
    """The stored tensors with a site's part of them replaced."""
    weight, bias = whole
    oriented = weight.T if site.transposed else weight
    a, b = site.rows or (0, oriented.shape[0])
    oriented = torch.cat((oriented[:a], part[0], oriented[b:]))
    if bias is not None and part[1] is not None:
        bias = torch.cat((bias[:a], part[1], bias[b:]))
    return oriented.T.contiguous() if site.transposed else oriented, bias


def overlap(one: Site, other: Site) -> bool:
    """Whether two sites of one module share rows."""
    if one.rows is None or other.rows is None:
        return True
    return one.rows[0] < other.rows[1] and other.rows[0] < one.rows[1]
