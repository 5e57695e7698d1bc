"""A fingerprint of a base model: architecture, tensor names, shapes and content, head left out."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.common.dtypes import base_dtype
from smidgen.common.errors import DeltaError
from smidgen.common.wrappers import bare
from smidgen.ports.attachment_record import base_buffers, base_tensors
from smidgen.sites.new_tensors import new_names


@dataclass(frozen=True)
class Fingerprint:
    """What a delta was trained on. `content` is a digest of the parameters' bytes in `dtype`, `buffers` one of the
    persistent buffers ("" for a model without any, and in files of before); `name` is for people."""

    architecture: str
    structure: str
    content: str
    dtype: str
    name: str = ""
    buffers: str = ""

    def to_json(self) -> dict[str, str]:
        """Plain data."""
        return {key: value for key, value in asdict(self).items() if value or key != "buffers"}

    @classmethod
    def of(cls, model: nn.Module, head: Collection[str], dtype: torch.dtype | None = None) -> Fingerprint:
        """Digest of all parameters but the head's, in sorted order, taken in `dtype` (default: the base's own).

        head: names of what the delta holds whatever stood there before. What the checkpoint lacked is left out too.
        """
        model = bare(model)
        left_out = _first_names(model, {*head, *(new_names(model) or ())})
        tensors = {n: t for n, t in sorted(base_tensors(model).items()) if n not in left_out}
        dtype = dtype or base_dtype(tensors)
        structure, content, rest = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        for name, tensor in tensors.items():
            structure.update(f"{name}{tuple(tensor.shape)}".encode())
            content.update(_bytes(tensor, dtype))
        buffers = base_buffers(model)
        for name, tensor in sorted(buffers.items()):
            rest.update(f"{name}{tuple(tensor.shape)}".encode())
            rest.update(_bytes(tensor, dtype))
        config: Any = getattr(model, "config", None)
        kind = getattr(config, "model_type", type(model).__name__)
        name = str(getattr(config, "_name_or_path", "") or "")
        one, other, last = (found.hexdigest()[:32] for found in (structure, content, rest))
        return cls(kind, one, other, str(dtype)[6:], name, last if buffers else "")


def _bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    """The bytes of a tensor, of real numbers in this dtype."""
    if tensor.is_meta:
        raise DeltaError("the base is on the meta device or offloaded, so its values cannot be read; load it")
    data = tensor.detach().to(device="cpu", dtype=dtype if tensor.is_floating_point() else None).contiguous()
    found: memoryview = data.reshape(-1).view(torch.uint8).numpy().data
    return found


def _first_names(model: nn.Module, names: Collection[str]) -> set[str]:
    """The names under which `named_parameters` gives these; a tied parameter has several."""
    named = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in names}
    return {n for n, p in model.named_parameters() if id(p) in named}


def verify(model: nn.Module, wanted: Fingerprint, head: Collection[str]) -> None:
    """Refuse a model that is not the base of a delta.

    A base loaded in a wider dtype is compared after rounding to the recorded one.

    Raises:
        DeltaError: another architecture, other tensors, other values, or a narrower dtype that cannot be compared.
    """
    found = base_dtype(base_tensors(model))
    recorded = getattr(torch, str(wanted.dtype), None)
    what = f"this delta was trained on {wanted.name or wanted.architecture!r}"
    if not isinstance(recorded, torch.dtype) or not recorded.is_floating_point:
        raise DeltaError(f"{what} in {wanted.dtype!r}, which is no dtype of a base: the delta is damaged")
    if torch.finfo(found).bits < torch.finfo(recorded).bits:
        raise DeltaError(
            f"{what} in {wanted.dtype}, but the base is loaded in {str(found)[6:]}, so it cannot be verified; "
            f"load it with dtype={wanted.dtype} (or pass verify=False to go without the check)"
        )
    have = Fingerprint.of(model, head, recorded)
    if have.architecture != wanted.architecture:
        raise DeltaError(f"{what} ({wanted.architecture}), but this model is a {have.architecture}")
    if have.structure != wanted.structure:
        raise DeltaError(f"{what}; this {have.architecture} has other tensors or shapes ({have.name or 'unnamed'})")
    if have.content != wanted.content:
        raise DeltaError(
            f"{what}; this model has the same shapes but other values (fingerprint {have.content[:8]}, "
            f"wanted {wanted.content[:8]}): another checkpoint, or one that was changed"
        )
    if wanted.buffers and have.buffers != wanted.buffers:
        raise DeltaError(
            f"{what}; this model has the same parameters but other buffers (running statistics, say; fingerprint "
            f"{have.buffers[:8] or 'none'}, wanted {wanted.buffers[:8]}): another checkpoint, or one that was trained"
        )
