"""float32 masters in a low-precision base: what enters and leaves their modules is cast, and what others read of them.

Four kinds of readers see a master. A norm computes with it in float32. Any other module computes with it rounded to
the dtype of the tensor that it stands for, and so does the nearest module above that is called: Mamba's mixer reads the
bias of its convolution, its block the dtype of a norm. From further above (a block, a model of transformers, the whole
model) it is seen by a view that is rounded when it is used. Rounded tensors and views stand in the instance's
`__dict__`, which attribute look-up reads before `_parameters`, for the length of a call; so does what a model answers
when it is asked for its `parameters()`, and so for its `dtype`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from smidgen.common.hook_types import Args, Kwargs
from smidgen.ports.during_call import stand, stand_down
from smidgen.ports.in_place.stored_view import MasterModule, StoredView, as_stored, casts, rounded
from smidgen.sites.site import module_at

NATIVE = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
ENTRANCES = (PreTrainedModel, GradientCheckpointingLayer)


Low = tuple[str, Mapping[str, torch.dtype], bool]  # path of a module, stored dtype of each master, whether it is a norm


@dataclass
class Reads:
    """What a module reads of masters while it is called."""

    near: list[tuple[nn.Module, str]] = field(default_factory=list)  # used there as a rule: rounded at once
    far: list[tuple[nn.Module, str]] = field(default_factory=list)  # seldom more than asked for their dtype: views
    models: list[nn.Module] = field(default_factory=list)  # that may be asked for the dtype of their parameters


class CastNorm(MasterModule):
    """A norm in which masters stand, as its hooks see it."""

    _given_dtypes: Mapping[torch.dtype, tuple[torch.dtype | None, ...]]  # dtype of the input -> of all that it gives
    _input_dtype: torch.dtype
    _read_by_others: Mapping[str, object]  # what stood in its `__dict__` before its call


class MasterReader(nn.Module):
    """A module that reads masters, as its hooks see it: what it reads, and what each call under way put there."""

    _reads: Reads
    _shown: tuple[tuple[tuple[nn.Module, str, object], ...], ...]  # module, name, what was there


def lift_norm(module: CastNorm, args: Args) -> Args | None:
    """Pre-hook of a norm: it sees its masters, whatever others read; torch's own, whose kernels want input and terms
    in one dtype, get their input in float32 too."""
    if not module._casting:
        return None
    module._read_by_others = {t: module.__dict__.pop(t) for t in module._stored_dtypes if t in module.__dict__}
    module._input_dtype = args[0].dtype
    return (args[0].float(), *args[1:]) if isinstance(module, NATIVE) else None


def lower_norm(module: CastNorm, args: Args, kwargs: Kwargs, output: object) -> object:
    """Forward hook of a norm with float32 terms in a low-precision base: back to the dtypes that the base's gives."""
    if not module._casting:
        return None
    entered = module._input_dtype
    if isinstance(output, Tensor) and entered in module._stored_dtypes.values():
        return output.to(entered)
    if entered not in module._given_dtypes:
        module._given_dtypes = {**module._given_dtypes, entered: _given(module, args, kwargs, entered)}
    dtypes = module._given_dtypes[entered]
    if isinstance(output, tuple):  # I-BERT's gives the scale of its quantised output, Zaya's queries and keys
        return tuple(map(_to, output, dtypes))
    return _to(output, *dtypes)


def _to(value: object, dtype: torch.dtype | None) -> object:
    return value.to(dtype) if isinstance(value, Tensor) and dtype is not None else value


def _given(module: CastNorm, args: Args, kwargs: Kwargs, entered: torch.dtype) -> tuple[torch.dtype | None, ...]:
    """dtype of all that a norm with the base's own terms gives for an input of this one, which may be another than
    theirs: T5's gives theirs, Llama's the wider one. Asked of the norm itself."""
    stored = next(iter(module._stored_dtypes.values()))
    if isinstance(module, NATIVE):
        return (stored,)
    module.__dict__.update({term: rounded(module, term) for term in module._stored_dtypes})
    try:
        with torch.no_grad():
            found = module.forward(args[0].to(entered), *args[1:], **kwargs)
        return tuple(getattr(value, "dtype", None) for value in (found if isinstance(found, tuple) else (found,)))
    finally:
        for term in module._stored_dtypes:
            module.__dict__.pop(term, None)


def show_again(module: CastNorm, args: Args, output: object) -> None:
    """Forward hook of a norm (always called): others read what they read before its call."""
    module.__dict__.update(module.__dict__.pop("_read_by_others", {}))


def show_rounded(reader: MasterReader, args: Args) -> None:
    """Pre-hook of a module that reads masters, its own or those of others: it sees them in the stored dtype."""
    reads = reader._reads
    shown: list[tuple[nn.Module, str, object]] = []
    for module, term in reads.near:
        before = module.__dict__.get(term)
        if casts(module) and (before is None or isinstance(before, StoredView)):
            shown.append((module, term, before))
            module.__dict__[term] = rounded(module, term)
    for module, term in reads.far:
        if casts(module) and term not in module.__dict__:
            shown.append((module, term, None))
            # a compiled graph drops what it does not use
            module.__dict__[term] = (rounded if torch.compiler.is_compiling() else StoredView.of)(module, term)
    for model in reads.models:
        if "parameters" not in model.__dict__:
            shown.append((model, "parameters", None))
            model.__dict__["parameters"] = partial(as_stored, model)
    reader._shown = (*reader.__dict__.get("_shown", ()), tuple(shown))


def hide(reader: MasterReader, args: Args, output: object) -> None:
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
        module = module_at(model, path)
        module.__dict__.update(_stored_dtypes=dict(stored), _given_dtypes={}, _casting=True)
        if norm:  # before the subset port puts chosen values in, and after it took them away
            handles.append(module.register_forward_pre_hook(lift_norm, prepend=True))
            handles.append(module.register_forward_hook(lower_norm, with_kwargs=True))
            handles.append(module.register_forward_hook(show_again, always_call=True))
    for path, reads in _readers(model, low).items():
        reader = module_at(model, path)
        reader.__dict__["_reads"] = reads
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


def _readers(model: nn.Module, low: Sequence[Low]) -> dict[str, Reads]:
    """Path of a module -> the masters that it reads, its own and those of others.

    A block and the models of transformers in a model read from afar as the whole does, because they are also run
    without it: blocks that are computed again in the backward pass, encoders by `generate`.
    """
    found: dict[str, Reads] = {}
    modules = dict(model.named_modules())
    for path, stored, norm in low:
        near = [*([] if norm else [path]), *_caller(model, path)]
        above = [path, *_above(path)]
        entrances = [p for p in above if not p or isinstance(modules[p], ENTRANCES)]
        terms = [(modules[path], term) for term in stored]
        for reader in dict.fromkeys([*near, *entrances]):
            reads = found.setdefault(reader, Reads())
            (reads.near if reader in near else reads.far).extend(terms)
        for reader in entrances:
            inside = (modules[p] for p in above[: above.index(reader) + 1] if p in entrances)
            asked = (m for m in inside if m is model or isinstance(m, PreTrainedModel))
            found[reader].models += [m for m in asked if m not in found[reader].models]
    return found


def _above(path: str) -> Iterator[str]:
    """Paths of the modules above, from the nearest to the model."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _caller(model: nn.Module, path: str) -> list[str]:
    """Path of the nearest module above that is called."""
    return [p for p in _above(path) if not isinstance(module_at(model, p), CONTAINERS)][:1]
