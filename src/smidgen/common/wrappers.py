"""The model inside a wrapper, and what a model must be to have something attached."""

from __future__ import annotations

import sys
from typing import Protocol, TypeGuard, TypeVar, cast

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import AutoBackbone, AutoModel, PretrainedConfig

from smidgen.common.errors import AttachError

_Model = TypeVar("_Model")

SCRIPT = "is compiled by torch.jit, which runs no hooks; pass the model that it was made of"
WRAPPED = "is wrapped by {name}, which knows the old parameters; attach to the model inside it first, then wrap it"
MESHED = (
    "is sharded over a device mesh already ({first} is a DTensor); give the plain model to fit, which shards it under "
    "accelerate launch --use_fsdp --fsdp_version 2"
)
PART = (
    "holds a part that torch.compile wrapped, {path}, whose tensors have other names than in the plain model; "
    "compile it in place ({path}.compile()), or the whole model"
)
OFFLOADED = (
    "is offloaded by accelerate: the values of {first} are not in the module, where the trained ones have to stand; "
    "load it without a device_map, or with one that has no 'cpu' and 'disk', in bfloat16 if memory is short"
)


class _Compiled(Protocol):
    """What `torch.compile` gives for a model."""

    _orig_mod: object


def bare(model: _Model) -> _Model:
    """The model inside of `torch.compile`, DataParallel and DistributedDataParallel, which share its modules with it.

    What is attached to it acts in the wrapper too. Anything else is given back as it is.
    """
    inside: object = model
    while True:
        if _compiled(inside):
            inside = inside._orig_mod
        elif isinstance(inside, DataParallel | DistributedDataParallel):
            inside = inside.module
        else:
            return cast(_Model, inside)


def is_plain(model: nn.Module) -> bool:
    """Whether a model is of a class that transformers gives for no task, whatever its `base_model_prefix` names.

    DINOv3's and Sapiens2's names their inner encoder.
    """
    config = cast(type[PretrainedConfig], type(getattr(model, "config", None)))
    known = [auto._model_mapping.get(config, ()) for auto in (AutoModel, AutoBackbone)]
    classes = [cls for found in known for cls in (found if isinstance(found, tuple | list) else (found,))]
    return "For" not in type(model).__name__ and type(model) in classes


def check_model(model: object) -> None:
    """Raises AttachError if nothing can be attached to a model: it is none, has no values, or a wrapper in the way."""
    if not isinstance(model, nn.Module):
        raise AttachError(f"the model is of type {type(model).__name__}, {model!r:.40}; smidgen.load gives one")
    inside = bare(model)
    if found := _why_not(model, inside):
        raise AttachError(f"this {type(inside).__name__} {found}")


def _why_not(model: nn.Module, inside: nn.Module) -> str | None:
    if isinstance(inside, torch.jit.ScriptModule):
        return SCRIPT
    for wrapper in (model, inside):
        if isinstance(wrapper, DistributedDataParallel) or type(wrapper).__name__ == "FullyShardedDataParallel":
            return WRAPPED.format(name=type(wrapper).__name__)
    part = next((path for path, module in inside.named_modules() if _compiled(module)), None)
    if part is not None:
        return PART.format(path=part)
    return _elsewhere(inside)


def _elsewhere(model: nn.Module) -> str | None:
    """Whether values are somewhere else. A model that was built on the meta device may be looked at."""
    parameters = dict(model.named_parameters())
    sharded = next((name for name, p in parameters.items() if hasattr(p, "device_mesh")), None)
    if sharded is not None:
        return MESHED.format(first=sharded)
    empty = next((name for name, p in parameters.items() if p.is_meta), None)
    hooked = empty is not None and any(hasattr(module, "_hf_hook") for module in model.modules())
    return OFFLOADED.format(first=empty) if hooked else None


def _compiled(model: object) -> TypeGuard[_Compiled]:
    """Whether a model came from `torch.compile`, whose module is not imported for the question."""
    frame = sys.modules.get("torch._dynamo.eval_frame")
    return frame is not None and isinstance(model, frame.OptimizedModule)
