"""Digests of tensors, taken once for each content: what was not written to since is not read again.

A content is told by the tensor object, its storage, place, shape and dtype, torch's count of in-place writes, and a
sample of its values. The count misses writes that torch does not see (through `.data` or a NumPy view, by a fused
optimiser's kernel). Those of optimisers are told by a hook behind their step; of the others, the sample finds every
write to a tensor of up to `SAMPLE` values and any that goes over a whole larger one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field

import torch
import xxhash
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from smidgen.common.errors import DeltaError

SAMPLE = 1024  # values of a tensor that are looked at each time


@dataclass(frozen=True)
class Content:
    """What tells that a tensor holds the values that it held before."""

    storage: StorageWeakRef  # held weakly: its address is not given to another while this lives
    place: tuple[int, torch.device, torch.dtype, tuple[int, ...], tuple[int, ...]]
    writes: int
    sample: int


@dataclass
class _Known:
    """A content, and its digest in each dtype that was asked for."""

    content: Content
    digests: dict[torch.dtype | None, bytes] = field(default_factory=dict)


_known: MutableMapping[Tensor, _Known] = WeakIdKeyDictionary()
_lock = threading.RLock()


def tensor_digests(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, bytes]:
    """Name -> 128-bit XXH3 of the tensor's bytes, 16 bytes; real numbers are taken in `dtype`.

    Raises:
        DeltaError: a tensor without values (on the meta device, or offloaded).
    """
    found = {}
    contents = _contents(tensors)
    for name, tensor in tensors.items():
        kind = dtype if tensor.is_floating_point() else None
        digest = _recalled(tensor, contents.get(name), kind)
        if digest is None:
            digest = xxhash.xxh3_128_digest(tensor_bytes(tensor, dtype))
            _remember(tensor, contents.get(name), kind, digest)
        found[name] = digest
    return found


def content_digest(model: nn.Module) -> str:
    """128 bits (hex) of the names, shapes, dtypes and values of a module's parameters and persistent buffers."""
    whole = xxhash.xxh3_128()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            digest = tensor_digests({name: tensor}, tensor.dtype)[name]
            whole.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode() + digest)
    return whole.hexdigest()


def tensor_bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    """The bytes of a tensor, of real numbers in this dtype; no copy of what lies there so. Raises DeltaError."""
    if tensor.is_meta:
        raise DeltaError("the base is on the meta device or offloaded, so its values cannot be read; load it")
    data = tensor.detach().to(device="cpu", dtype=dtype if tensor.is_floating_point() else None).contiguous()
    found: memoryview = data.reshape(-1).view(torch.uint8).numpy().data
    return found


def _recalled(tensor: Tensor, content: Content | None, dtype: torch.dtype | None) -> bytes | None:
    with _lock:
        known = _known.get(tensor)
        return None if known is None or known.content != content else known.digests.get(dtype)


def _remember(tensor: Tensor, content: Content | None, dtype: torch.dtype | None, digest: bytes) -> None:
    if content is None:
        return
    with _lock:
        known = _known.get(tensor)
        if known is None or known.content != content:
            _known[tensor] = known = _Known(content)
        known.digests[dtype] = digest


def _contents(tensors: Mapping[str, Tensor]) -> dict[str, Content]:
    """Of every tensor whose writes are counted; one of inference mode or of a class of its own has none."""
    plain = {name: tensor for name, tensor in tensors.items() if _is_plain(tensor)}
    samples = _samples(plain)
    found = {}
    for name, tensor in plain.items():
        place = (tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())
        found[name] = Content(StorageWeakRef(tensor.untyped_storage()), place, tensor._version, samples[name])
    return found


def _is_plain(tensor: Tensor) -> bool:
    known = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return known and not (tensor.is_meta or tensor.is_inference() or tensor.is_quantized)


def _samples(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name -> digest of up to `SAMPLE` values, evenly apart; one copy from each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.device, tensor.dtype), []).append(name)
    found = {}
    with torch.inference_mode(False), torch.no_grad():
        for names in groups.values():
            parts = [_spread(tensors[name].detach()) for name in names]
            data = torch.cat(parts).cpu().view(torch.uint8).numpy().data
            start, size = 0, tensors[names[0]].element_size()
            for name, part in zip(names, parts, strict=True):
                end = start + part.numel() * size
                found[name], start = xxhash.xxh3_64_intdigest(data[start:end]), end
    return found


def _spread(tensor: Tensor) -> Tensor:
    """Up to `SAMPLE` of a tensor's values, (n,), from its first on; the step is odd, to go through columns too."""
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()
    return flat if len(flat) <= SAMPLE else flat[:: -(-len(flat) // SAMPLE) | 1]


def forget(tensors: Iterable[Tensor]) -> None:
    """Let these be read again."""
    with _lock:
        for tensor in tensors:
            _known.pop(tensor, None)


def _after_optimizer(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """Behind every step of any optimiser: fused kernels do not count their writes."""
    if _known:
        forget(p for group in optimizer.param_groups for p in group["params"])


register_optimizer_step_post_hook(_after_optimizer)
