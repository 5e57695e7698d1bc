"""float32 masters in a low-precision base: what enters and leaves their modules is cast, and what others read of them.

Three kinds of readers see a master. A norm computes with it in float32. Any other module computes with it rounded to
the dtype of the tensor that it stands for. And so does whoever reads it without a call of its module: Mamba's mixer
reads the bias of its convolution, its block the dtype of a norm. Rounded tensors stand in the instance's `__dict__`,
which attribute look-up reads before `_parameters`, for the length of a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.ports.during_call import stand, stand_down
from smidgen.ports.in_place.sparse_values import composed
from smidgen.sites.site import module_at

NATIVE = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


Low = tuple[str, Mapping[str, torch.dtype], bool]  # path of a module, stored dtype of each master, whether it is a norm


def rounded(module: Any, term: str) -> Tensor:
    """A module's tensor as its base stores it: chosen values put in, in the stored dtype."""
    return composed(module, term).to(module._stored_dtypes[term])


def lift_norm(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Pre-hook of a norm: it sees its masters, whatever others read; torch's own, whose kernels want input and terms
    in one dtype, get their input in float32 too."""
    if not module._casting:
        return None
    module._read_by_others = {t: module.__dict__.pop(t) for t in module._stored_dtypes if t in module.__dict__}
    module._input_dtype = args[0].dtype
    return (args[0].float(), *args[1:]) if isinstance(module, NATIVE) else None


def lower_norm(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a norm with float32 terms in a low-precision base: back to the dtype that the base's gives."""
    if not module._casting:
        return None
    entered: torch.dtype = module._input_dtype
    if entered in module._stored_dtypes.values():
        return _to(output, entered)
    if entered not in module._given_dtypes:
        module._given_dtypes = {**module._given_dtypes, entered: _given(module, args, kwargs, entered)}
    return _to(output, module._given_dtypes[entered])


def _to(output: Any, dtype: torch.dtype) -> Any:
    """What a norm gives, in a dtype; I-BERT's gives the scale of its quantised output as well."""
    return (output[0].to(dtype), *output[1:]) if isinstance(output, tuple) else output.to(dtype)


def _given(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], entered: torch.dtype) -> torch.dtype:
    """dtype that a norm with the base's own terms gives for an input that has another than they: T5's gives theirs,
    Llama's the wider one. Asked of the norm itself."""
    stored: torch.dtype = next(iter(module._stored_dtypes.values()))
    if isinstance(module, NATIVE):
        return stored
    module.__dict__.update({term: rounded(module, term) for term in module._stored_dtypes})
    try:
        with torch.no_grad():
            found = module.forward(args[0].to(entered), *args[1:], **kwargs)
        given: torch.dtype = (found[0] if isinstance(found, tuple) else found).dtype
        return given
    finally:
        for term in module._stored_dtypes:
            module.__dict__.pop(term, None)


def show_again(module: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of a norm (always called): others read what they read before its call."""
    module.__dict__.update(module.__dict__.pop("_read_by_others", {}))


def lower_inputs(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Pre-hook of any other module in a low-precision base: what enters gets the dtype of its rounded masters."""
    if not module._casting:
        return None
    base = next(iter(module._stored_dtypes.values()))
    return tuple(a.to(base) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def show_rounded(reader: Any, args: tuple[Any, ...]) -> None:
    """Pre-hook of a module that reads masters, its own or those of others: it sees them rounded."""
    shown = []
    for module, term, used in reader._reads:
        before = module.__dict__.get(term)
        if module._casting and (before is None or (used and not before.requires_grad)):
            with nullcontext() if used else torch.no_grad():
                module.__dict__[term] = rounded(module, term)
            shown.append((module, term, before))
    reader._shown = (*reader.__dict__.get("_shown", ()), tuple(shown))


def hide(reader: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of it (always called): take away what its own call put there, and not what a caller did."""
    *outer, shown = reader.__dict__.get("_shown") or ((),)
    reader._shown = tuple(outer)
    for module, term, before in reversed(shown):
        module.__dict__.pop(term, None)
        module.__dict__.update({} if before is None else {term: before})


def place_casts(model: nn.Module, low: Sequence[Low]) -> list[RemovableHandle]:
    """Hooks that let float32 masters stand in modules of a low-precision base; `drop_casts` takes the rest away."""
    handles: list[RemovableHandle] = []
    for path, stored, norm in low:
        module: Any = module_at(model, path)
        module._stored_dtypes, module._given_dtypes, module._casting = dict(stored), {}, True
        if norm:  # before the subset port puts chosen values in, and after it took them away
            handles.append(module.register_forward_pre_hook(lift_norm, prepend=True))
            handles.append(module.register_forward_hook(lower_norm, with_kwargs=True))
            handles.append(module.register_forward_hook(show_again, always_call=True))
        else:
            handles.append(module.register_forward_pre_hook(lower_inputs))
    for path, reads in _readers(model, low).items():
        reader: Any = module_at(model, path)
        reader._reads = tuple(reads)
        handles += stand(reader, show_rounded, hide, prepend=True)
    return handles


def drop_casts(model: nn.Module, low: Sequence[Low]) -> None:
    """Take away what `place_casts` left on the modules."""
    for path, _, _ in low:
        for name in ("_casting", "_stored_dtypes", "_given_dtypes", "_input_dtype"):
            module_at(model, path).__dict__.pop(name, None)
    for path in _readers(model, low):
        reader = module_at(model, path)
        stand_down(reader)
        for name in ("_reads", "_shown"):
            reader.__dict__.pop(name, None)


def _readers(model: nn.Module, low: Sequence[Low]) -> dict[str, list[tuple[nn.Module, str, bool]]]:
    """Path of a module -> the masters that it sees rounded, its own and those that it may read of others, and whether
    their gradient counts.

    The nearest module above that is called may read all of a module's; the model itself the vectors, because models ask
    deep down for a dtype (of the first norm, say): without gradient, so that a block that is computed again, without
    the model around it, does the same operations.
    """
    found: dict[str, list[tuple[nn.Module, str, bool]]] = {}
    for path, stored, norm in low:
        module: Any = module_at(model, path)
        for term in stored:
            readers = [*([] if norm else [path]), *_caller(model, path)]
            asks = [""] if path and module._parameters[term].ndim < 2 else []
            for reader in dict.fromkeys([*readers, *asks]):
                found.setdefault(reader, []).append((module, term, reader in readers))
    return found


def _caller(model: nn.Module, path: str) -> Iterator[str]:
    """Path of the nearest module above that is called."""
    while path:
        path = path.rpartition(".")[0]
        if not isinstance(module_at(model, path), CONTAINERS):
            yield path
            return
