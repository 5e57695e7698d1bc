"""A module's tensors as its sites see them, and back: Conv1D stores the transpose, slices are some of the rows, a
quantised map has codes, a convolution's weight more axes than two and its channels before the places of an image."""

from __future__ import annotations

from torch import Tensor, nn

from smidgen.common.dtypes import master_dtype
from smidgen.sites.quantised.maps import own_weight
from smidgen.sites.site import ConvSite, NormSite, OwnerSite, Site

Pair = tuple[Tensor, Tensor | None]


def parameters_of(module: nn.Module) -> Pair:
    """Weight and bias of a module with nothing attached, in the dtype of master values, without gradient."""
    weight, bias = own_weight(module), module._parameters.get("bias")
    if weight is None:
        stored = module._parameters["weight"]
        assert stored is not None
        weight = stored.detach().to(master_dtype(stored.dtype))
    return weight, None if bias is None else bias.detach().to(weight.dtype)


def seen_from(site: Site, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """What a site sees of them: "weight" (width_out, width_in), "bias" (width_out,) if there is one.

    Of a convolution the weight is (width_out, width_in / groups * kernel size); of a norm that keeps its gain as the
    distance from 1, the gain itself.
    """
    oriented = _oriented(site, weight)
    rows, offset = site.rows, _offset(site)
    part = oriented if rows is None else rows.take(oriented)
    seen = {"weight": part + offset if offset else part}
    if bias is not None:
        seen["bias"] = bias if rows is None else rows.take(bias)
    return seen


def put_back(site: Site, whole: Pair, part: Pair) -> Pair:
    """The stored tensors with a site's part of them replaced."""
    weight, bias = whole
    oriented = _oriented(site, weight)
    rows, offset = site.rows, _offset(site)
    stored_part = part[0] - offset if offset else part[0]
    new = stored_part if rows is None else rows.put(oriented, stored_part)
    if bias is not None and part[1] is not None:
        bias = part[1] if rows is None else rows.put(bias, part[1])
    return new.T.contiguous() if site.transposed else new.view(weight.shape), bias


def _oriented(site: Site, weight: Tensor) -> Tensor:
    """Output rows first, and for a convolution everything else in one axis."""
    if isinstance(site, ConvSite):
        return weight.flatten(1)
    return weight.T if site.transposed else weight


def _offset(site: Site) -> float:
    return site.offset if isinstance(site, NormSite) else 0.0


def axis_of(site: Site) -> int:
    """Where what enters and leaves a site's module has its widths."""
    return site.axis if isinstance(site, OwnerSite) else -1


def channels_last(site: Site, t: Tensor) -> Tensor:
    """What enters or leaves a site's module, with its channels at the end, where methods expect them."""
    axis = axis_of(site)
    return t if axis == -1 else t.movedim(axis, -1)


def channels_back(site: Site, t: Tensor) -> Tensor:
    """The inverse of `channels_last`."""
    axis = axis_of(site)
    return t if axis == -1 else t.movedim(-1, axis)


def overlap(one: Site, other: Site) -> bool:
    """Whether two sites of one module share rows."""
    rows, others = one.rows, other.rows
    return rows is None or others is None or rows.overlaps(others)
