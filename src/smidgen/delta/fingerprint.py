"""A fingerprint of a base model: architecture, tensor names, shapes and content, head left out.

It tells one checkpoint from another; it is no protection from someone who wants two to look alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

import torch
import xxhash
from torch import Tensor, nn

from smidgen.common.dtypes import base_dtype
from smidgen.common.errors import DeltaError
from smidgen.common.wrappers import bare
from smidgen.delta.content_hash import tensor_bytes, tensor_digests
from smidgen.ports.attachment_record import base_buffers, base_tensors
from smidgen.sites.new_tensors import new_names
from smidgen.sites.quantised.maps import float_maps, logical_shapes, quantised_as, scheme_of, weight_parts

SHA256, XXH3 = "sha256", "xxh3_128"
KEPT = 64  # SHA-256 digests that are remembered, of old files' contents

_sha256: dict[str, str] = {}  # XXH3 of names, shapes and content -> SHA-256 of the same bytes


@dataclass(frozen=True)
class Fingerprint:
    """What a delta was trained on.

    Attributes:
        architecture: `model_type` of the configuration, or the class.
        structure: digest of names and shapes.
        content: digest of the parameters' bytes in `dtype`.
        buffers: digest of the persistent buffers; "" for a model without any, and in some older files.
        name: for people.
        algorithm: of `content` and `buffers`: "xxh3_128", or "sha256" in files from before it.
        quantised: the scheme of the maps whose weight is stored in few bits ("nf4"); their codes and scales are part
            of `content`, as they are, whatever `dtype` is. "" for a base of real numbers.
        kept: paths of the linear maps that such a base keeps in real numbers, parted by spaces.
    """

    architecture: str
    structure: str
    content: str
    dtype: str
    name: str = ""
    buffers: str = ""
    algorithm: str = SHA256
    quantised: str = ""
    kept: str = ""

    def __post_init__(self) -> None:
        if self.algorithm not in (SHA256, XXH3):
            raise DeltaError(f"the base's content is told by {self.algorithm!r}; known are {XXH3} and {SHA256}")

    @property
    def values(self) -> str:
        """Digest of parameters and buffers together."""
        return self.content + self.buffers

    def to_json(self) -> dict[str, str]:
        """Plain data, as `Fingerprint(**data)` reads it."""
        absent = {"buffers": "", "algorithm": SHA256, "quantised": "", "kept": ""}
        return {key: value for key, value in asdict(self).items() if absent.get(key) != value}

    @classmethod
    def of(
        cls,
        model: nn.Module,
        head: Collection[str],
        dtype: torch.dtype | None = None,
        algorithm: str = XXH3,
        stored_as: Fingerprint | None = None,
    ) -> Fingerprint:
        """Digest of all parameters but the head's, in sorted order, taken in `dtype` (default: the base's own).

        Nothing is read again that was not written to since (see `content_hash`).

        Args:
            head: names of what the delta holds whatever stood there before. What the checkpoint lacked is left out too.
            algorithm: "sha256" to compare with a file that has it.
            stored_as: the fingerprint of a quantised base: that of this model, of real numbers, if its maps were stored
                in the same way.

        Raises:
            DeltaError: values that cannot be read, on the meta device or offloaded.
        """
        model = bare(model)
        left_out = _first_names(model, {*head, *(new_names(model) or ())})
        tensors = {n: t for n, t in sorted(base_tensors(model).items()) if n not in left_out}
        buffers = dict(sorted(base_buffers(model).items()))
        dtype = dtype or base_dtype(tensors)
        shapes = logical_shapes(model)
        told = (f"{n}{shapes.get(id(t), tuple(t.shape))}" for n, t in tensors.items())
        structure = hashlib.sha256("".join(told).encode())
        scheme = scheme_of(model) if stored_as is None else stored_as.quantised
        parts = weight_parts(model) if stored_as is None else _parts_if(model, stored_as, dtype)
        config = getattr(model, "config", None)
        return cls(
            getattr(config, "model_type", type(model).__name__),
            structure.hexdigest()[:32],
            _content(tensors, dtype, algorithm, False, parts),
            str(dtype)[6:],
            str(getattr(config, "_name_or_path", "") or ""),
            _content(buffers, dtype, algorithm, True, {}) if buffers else "",
            algorithm,
            scheme,
            stored_as.kept if stored_as is not None else " ".join(float_maps(model)) if scheme else "",
        )


def _parts_if(model: nn.Module, base: Fingerprint, dtype: torch.dtype) -> dict[int, Mapping[str, Tensor]]:
    """Identity of each weight that a quantised base stores in parts -> these parts, made of the weight here."""
    kept = set(base.kept.split())
    maps = (m for path, m in model.named_modules() if isinstance(m, nn.Linear) and path not in kept)
    weights = (module._parameters["weight"] for module in maps)
    return {id(w): quantised_as(base.quantised, w.detach().to(dtype)) for w in weights if w is not None}


def _content(
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    algorithm: str,
    named: bool,
    stored: Mapping[int, Mapping[str, Tensor]],
) -> str:
    """128 bits (hex) of what tensors hold; `named`: with names and shapes in SHA-256, as XXH3 always is.

    stored: identity of a quantised weight -> the tensors that it is made of, which are taken as they are.
    """
    whole = xxhash.xxh3_128()
    plain = {name: tensor for name, tensor in tensors.items() if id(tensor) not in stored}
    for name, digest in tensor_digests(plain, dtype).items():
        whole.update(f"{name}{tuple(tensors[name].shape)}".encode() + digest)
    for name, tensor in tensors.items():
        for part, values in stored.get(id(tensor), {}).items():
            digest = tensor_digests({name: values}, values.dtype)[name]
            whole.update(f"{name}.{part}{tuple(values.shape)}{values.dtype}".encode() + digest)
    fast = whole.hexdigest()
    if algorithm == XXH3:
        return fast
    key = f"{fast}{dtype}{named}"
    if key not in _sha256:
        slow = hashlib.sha256()
        for name, tensor in tensors.items():
            slow.update(f"{name}{tuple(tensor.shape)}".encode() if named else b"")
            slow.update(tensor_bytes(tensor, dtype))
        while len(_sha256) >= KEPT:
            _sha256.pop(next(iter(_sha256)), None)
        _sha256[key] = slow.hexdigest()[:32]
    return _sha256[key]


def _first_names(model: nn.Module, names: Collection[str]) -> set[str]:
    """The names under which `named_parameters` gives these; a tied parameter has several."""
    named = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in names}
    return {n for n, p in model.named_parameters() if id(p) in named}


def _as_then(wanted: Fingerprint) -> str:
    return f" (codes follow from the dtype that they were made of: {wanted.dtype})" if wanted.quantised else ""


def _same_storage(what: str, have: Fingerprint, wanted: Fingerprint) -> None:
    if have.quantised != wanted.quantised:
        trained, found = (base.quantised or base.dtype for base in (wanted, have))
        raise DeltaError(
            f"{what} in {trained}, but the base is in {found}: load it with quantize={wanted.quantised or 'none'!r}, "
            "or ask for the other base with smidgen.rebase(delta, model)"
        )


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
    have = Fingerprint.of(model, head, recorded, wanted.algorithm)
    _same_storage(what, have, wanted)
    if have.architecture != wanted.architecture:
        raise DeltaError(f"{what} ({wanted.architecture}), but this model is a {have.architecture}")
    if have.structure != wanted.structure:
        raise DeltaError(f"{what}; this {have.architecture} has other tensors or shapes ({have.name or 'unnamed'})")
    if have.content != wanted.content:
        raise DeltaError(
            f"{what}; this model has the same shapes but other values (fingerprint {have.content[:8]}, "
            f"wanted {wanted.content[:8]}): another checkpoint, or one that was changed{_as_then(wanted)}"
        )
    if wanted.buffers and have.buffers != wanted.buffers:
        raise DeltaError(
            f"{what}; this model has the same parameters but other buffers (running statistics, say; fingerprint "
            f"{have.buffers[:8] or 'none'}, wanted {wanted.buffers[:8]}): another checkpoint, or one that was trained"
        )
