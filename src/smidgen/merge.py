"""merge: a plain model of the same class that does what the attached one does, at no cost."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.attach import attach, remove
from smidgen.attachment import Attachment, attachment
from smidgen.casts import master_dtype
from smidgen.delta import Delta
from smidgen.errors import AttachError
from smidgen.ports import Edit
from smidgen.subsets import current


class RoundingWarning(UserWarning):
    """Merging into a low-precision base rounded trained values."""


def merge(model: nn.Module, delta: Delta | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """Fold a delta (or what is attached) into a copy of the model; the model itself is not touched.

    Args:
        delta: what to fold; None for what is attached now.
        dtype: of the merged model; by default the base's. float32 keeps trained values whole.

    Raises:
        AttachError: a method cannot be folded, a pooling that the class does not have, or a tied weight.

    Warns:
        RoundingWarning: how many trained values a low-precision dtype lost, and the largest error.
    """
    if delta is None:
        attachment(model)  # raises if there is nothing to merge
    merged = copy.deepcopy(model)
    if delta is not None:
        attach(merged, delta)
    record = attachment(merged)
    _refuse(merged, record)
    values = _folded(merged, record)
    before = {name: tensor.detach() for name, tensor in record.base_tensors(merged) if name in values}
    remove(merged)
    if dtype is not None:
        merged.to(dtype)
    lost, worst = 0, 0.0
    for name, value in values.items():
        parameter = merged.get_parameter(name)
        rounded = value.to(parameter.dtype)
        lost += int(((rounded == before[name].to(parameter.dtype)) & (value != before[name])).sum())
        worst = max(worst, float((rounded.to(value.dtype) - value).abs().max()))
        parameter.data = rounded.clone()
    if worst > 0:
        _warn(values, lost, worst, parameter.dtype)
    return merged


def _warn(values: Mapping[str, Tensor], lost: int, worst: float, dtype: torch.dtype) -> None:
    count = sum(value.numel() for value in values.values())
    warnings.warn(
        f"merging into {str(dtype)[6:]} rounded {count:,} values: {lost:,} of them fell back to the base's, largest "
        f"error {worst:.2g}; merge(..., dtype=torch.float32) keeps them",
        RoundingWarning,
        stacklevel=3,
    )


def _refuse(model: nn.Module, record: Attachment) -> None:
    if record.plan.pooling is not None:
        raise AttachError(
            f"pooling={record.plan.pooling!r} cannot be merged: a plain {type(model).__name__} reads "
            f"{record.plan.reads or 'its own'} token; keep the delta attached, or train with the class's own pooling"
        )
    added = [row for row in record.plan.rows if row.added]
    reasons = {str(row.method): why for row in added if (why := row.method.unmergeable(row.site))}
    if reasons:
        listed = "; ".join(f"{method}: {why}" for method, why in reasons.items())
        raise AttachError(f"not to be folded into the weights, keep the delta attached: {listed}")


def _folded(model: nn.Module, record: Attachment) -> dict[str, Tensor]:
    """Parameter name -> merged value in master precision."""
    values = {swap.name: swap.master.detach() for swap in record.swaps if swap.trained} | record.whole_parts(model)
    for path in dict.fromkeys(path for path, _ in record.edits):
        module: Any = model.get_submodule(path)
        _refuse_tied(model, path, module.weight)
        dtype = master_dtype(module.weight.dtype)
        weight = current(module, "weight").to(dtype)
        bias = None if module.bias is None else current(module, "bias").to(dtype)
        for edit in module.edits.values():
            weight, bias = _fold(edit, weight, bias)
        values[f"{path}.weight"] = weight
        if bias is not None:
            values[f"{path}.bias"] = bias
    return values


def _fold(edit: Edit, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One edit folded into the stored weight; the method sees (width_out, width_in) and its own rows."""
    site = edit.site
    p = {symbol: tensor.detach() for symbol, tensor in edit.tensors().items()}
    oriented = weight.T if site.transposed else weight
    a, b = site.rows or (0, oriented.shape[0])
    part, part_bias = edit.method.merge(p, oriented[a:b], None if bias is None else bias[a:b], site)
    if bias is None and part_bias is not None:
        raise AttachError(f"{edit.method} needs a bias at {site.name}, which has none; keep it attached")
    oriented = torch.cat((oriented[:a], part, oriented[b:]))
    if bias is not None and part_bias is not None:
        bias = torch.cat((bias[:a], part_bias, bias[b:]))
    return oriented.T.contiguous() if site.transposed else oriented, bias


def _refuse_tied(model: nn.Module, path: str, weight: nn.Parameter) -> None:
    owners = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(owners) > 1:
        raise AttachError(f"{path}.weight is tied to {owners}: merging into one would change the other; untie first")
