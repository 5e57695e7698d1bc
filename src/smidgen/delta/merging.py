"""merge: a plain model of the same class that does what the attached one does, at no cost."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from smidgen.common.errors import AttachError
from smidgen.common.finite_values import not_finite
from smidgen.common.module_modes import copied
from smidgen.common.wrappers import bare, check_model
from smidgen.delta.arithmetic.sums import Sum
from smidgen.delta.attaching import attach, remove
from smidgen.delta.delta import Delta
from smidgen.ports.attachment_record import Attachment, attachment
from smidgen.ports.builtin_ports import port_of
from smidgen.ports.in_place.untying import untie
from smidgen.sites.new_tensors import keep_note
from smidgen.sites.quantised.maps import own_weight, quantised_maps, scheme_of, stored_bytes
from smidgen.sites.quantised.plain_maps import dequantise


class RoundingWarning(UserWarning):
    """Merging into a low-precision base rounded trained values."""


class DequantisedWarning(UserWarning):
    """Merging changed quantised maps, so the merged model has all of them in real numbers."""


def merge(model: nn.Module, delta: Delta | Sum[Delta] | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """Fold a delta (or what is attached) into a copy of the model; the model itself is not touched.

    Args:
        model: the base, or what something is attached to; of a wrapper the model inside, which is what comes back.
        delta: what to fold, or a sum of deltas; None for what is attached now.
        dtype: of the merged model; by default the base's. float32 keeps trained values whole. With one given, a
            quantised base is dequantised; without, where a map changes: what changes norms and biases alone leaves the
            maps as they are stored.

    Raises:
        AttachError: a method cannot be folded, a pooling that the class does not have, or a value that is not finite,
            or not any more in the merged model's dtype.

    Warns:
        UntiedWarning: a weight that was tied to another got values of its own.
        DequantisedWarning: the base was quantised, and the merged model is not.
        RoundingWarning: how many trained values a low-precision dtype lost, and the largest error.
    """
    if delta is None:
        attachment(model)  # raises if there is nothing to merge
    model = bare(model)
    check_model(model)
    merged = keep_note(model, copied(model))
    if delta is not None:
        attach(merged, delta)
    record = attachment(merged)
    _refuse(merged, record)
    with torch.no_grad():
        values = {name: value.detach() for name, value in folded(merged).items()}
    if found := not_finite(values):
        raise AttachError(f"not merged: {found}; training diverged, train again with a lower learning rate")
    stored = {f"{path}.weight": module for path, module, _ in quantised_maps(merged)}
    values = {name: value for name, value in values.items() if not _as_stored(stored.get(name), value)}
    paths = {path for path, _ in record.edits}
    edited = {name for name in values if name.rpartition(".")[0] in paths}
    remove(merged)
    if stored and (dtype is not None or stored.keys() & values.keys()):
        _dequantise(merged, dtype or record.dtype)
    before = {name: merged.get_parameter(name).detach() for name in values}
    untie(merged, [n for n, value in values.items() if n in edited and not torch.equal(value, before[n].to(value))])
    if dtype is not None:
        merged.to(dtype)
    lost, worst = 0, 0.0
    for name, value in values.items():
        parameter = merged.get_parameter(name)
        rounded = value.to(parameter.dtype)
        if found := not_finite({name: rounded}):
            kind = str(parameter.dtype)[6:]
            raise AttachError(f"not merged: in {kind}, {found}, too large for it; use merge(..., dtype=torch.float32)")
        lost += int(((rounded == before[name].to(parameter.dtype)) & (value != before[name])).sum())
        worst = max(worst, float((rounded.to(value.dtype) - value).abs().max()))
        parameter.data = rounded.clone()
    if worst > 0:
        _warn(values, lost, worst, parameter.dtype)
    return merged


def _as_stored(module: nn.Module | None, value: Tensor) -> bool:
    """Whether a quantised map's weight is what was folded: only its bias changed."""
    weight = None if module is None else own_weight(module)
    return weight is not None and torch.equal(weight, value)


def _dequantise(model: nn.Module, dtype: torch.dtype) -> None:
    scheme, size = scheme_of(model), stored_bytes(model)
    dequantise(model, dtype)
    warnings.warn(
        f"merging into a base in {scheme} gives its maps real numbers: {size:,} bytes become {stored_bytes(model):,} "
        f"in {str(dtype)[6:]}; keep the delta attached to keep the base small",
        DequantisedWarning,
        stacklevel=3,
    )


def _warn(values: Mapping[str, Tensor], lost: int, worst: float, dtype: torch.dtype) -> None:
    count = sum(value.numel() for value in values.values())
    warnings.warn(
        f"merging into {str(dtype)[6:]} rounded {count:,} values: {lost:,} of them fell back to the base's, largest "
        f"error {worst:.2g}; dtype=torch.float32 keeps them",
        RoundingWarning,
        stacklevel=3,
    )


def _refuse(model: nn.Module, record: Attachment) -> None:
    """Raise AttachError where something attached has no form in the plain weights."""
    if record.plan.pooling is not None:
        raise AttachError(
            f"pooling={record.plan.pooling!r} cannot be merged: a plain {type(model).__name__} reads "
            f"{record.plan.reads or 'its own'} token; keep the delta attached, or train with the class's own pooling"
        )
    reasons: dict[str, str] = {}
    for entry in record.plan.entries:
        if entry.added and (why := entry.method.unmergeable(entry.site)):
            reasons.setdefault(str(entry.method), why)
    if reasons:
        listed = "; ".join(f"{method}: {why}" for method, why in reasons.items())
        raise AttachError(f"not to be folded into the weights, keep the delta attached: {listed}")


def folded(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> merged value in master precision, with gradient to what is trained, of an attached model."""
    record = attachment(model)
    values = {swap.name: swap.master for swap in record.swaps if swap.trained} | record.whole_parts(model)
    places = {entry.site.path: entry.site for entry in record.plan.entries if entry.added and not entry.owns_shared}
    for path, site in places.items():
        values |= port_of(site).folded(model, path)
    return values
