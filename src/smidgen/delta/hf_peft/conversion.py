"""To and from the adapter files of Hugging Face PEFT, with their heads.

What one side cannot say is an error there, never dropped.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from smidgen.common.errors import DeltaError
from smidgen.common.finite_values import not_finite
from smidgen.common.wrappers import bare
from smidgen.delta.attaching import attached
from smidgen.delta.delta import Delta
from smidgen.delta.hf_peft.adapter_files import AdapterFile, read_adapter, write_adapter
from smidgen.delta.hf_peft.lora import read_lora, write_lora
from smidgen.delta.hf_peft.prompts import read_prefix, read_prompt, write_prefix, write_prompt
from smidgen.delta.hf_peft.reading import Reader, Values, read_ia3, read_ln
from smidgen.delta.hf_peft.writing import Parts, Placed, placed, write_head, write_ia3, write_ln
from smidgen.methods.attention.prefix import Prefix
from smidgen.methods.base import Method
from smidgen.methods.bottleneck.adapter import Adapter as Bottleneck
from smidgen.methods.in_place.bitfit import BitFit
from smidgen.methods.in_place.full import Full
from smidgen.methods.in_place.head import Head
from smidgen.methods.in_place.ln import LN
from smidgen.methods.low_rank.dora import DoRA
from smidgen.methods.low_rank.lora import LoRA
from smidgen.methods.low_rank.pissa import PiSSA
from smidgen.methods.prompt.prompt_tuning import PromptTuning
from smidgen.methods.scaling.ia3 import IA3
from smidgen.methods.scaling.ssf import SSF
from smidgen.planning.plans import Plan
from smidgen.planning.resolution import resolve
from smidgen.ports.attachment_record import attachment, refuse_attached, trained_parameters
from smidgen.recipe.recipe import Recipe, Term

Writer = Callable[[Method, list[Placed], nn.Module], Parts]
READERS: Mapping[str, Callable[[Reader], tuple[Method, Values]]] = {
    "LN_TUNING": read_ln,
    "LORA": read_lora,
    "IA3": read_ia3,
    "PREFIX_TUNING": read_prefix,
    "PROMPT_TUNING": read_prompt,
}
WRITERS: Mapping[type[Term], Writer] = {
    LN: write_ln,
    LoRA: write_lora,
    DoRA: write_lora,
    PiSSA: write_lora,
    IA3: write_ia3,
    Prefix: write_prefix,
    PromptTuning: write_prompt,
}
# Why the other methods cannot be written.
REASONS: Mapping[type[Term], str] = {
    BitFit: "PEFT trains biases only beside LoRA (LoraConfig(bias=...))",
    Bottleneck: "PEFT has no bottleneck adapters",
    SSF: "PEFT has no scale and shift",
    Head: "PEFT saves a head only beside a method",
    Full: "PEFT has no full fine-tuning",
}


class MissingHeadWarning(UserWarning):
    """An adapter file has no values for the model's head, so they are the model's own."""


def from_peft(source: str | os.PathLike[str], model: nn.Module) -> Delta:
    """Read a PEFT adapter (a folder, or a hub id) as a delta of this base; the model comes back untouched.

    The head is read from `modules_to_save`; what the file lacks of it is the model's own, as it is in PEFT. Other
    modules that it names become `Full(target=...)` beside the method.

    Raises:
        DeltaError: the files are damaged, belong to another model, or hold what no recipe here trains.
        AttachError: something is attached to the model.

    Warns:
        MissingHeadWarning: the model has a head that the file lacks, in whole or in part.
    """
    refuse_attached(model)
    model, adapter = bare(model), read_adapter(source)
    method, values = READERS[adapter.kind](Reader(adapter, model))
    recipe: Term | Recipe = method
    plan = resolve(model, recipe)
    if whole := _saved_whole(adapter, model, plan):
        recipe = method + Full(target=_covering(model, whole))
        plan = resolve(model, recipe)
        values |= {name: adapter.saved[name] for name in whole}
    missing = _add_head(adapter, model, plan, values)
    if found := not_finite(values):
        raise DeltaError(f"{source}: {found}; its training diverged, or the file is damaged")
    named = _by_saved_name(plan, values)
    with attached(model, recipe):
        with torch.no_grad():
            for name, parameter in trained_parameters(model).items():
                parameter.copy_(named[name])
        delta = Delta.of(model, source=f"peft {adapter.kind}")
    return delta.with_info(head_from_model=missing) if missing else delta


def to_peft(delta: Delta, model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a delta as an adapter that `peft.PeftModel.from_pretrained(model, folder)` loads.

    Args:
        delta: of a recipe that is one LN, LoRA, DoRA, PiSSA (written as a LoRA of twice the rank), IA3, Prefix or
            PromptTuning.
        model: the base that it was trained on, with nothing attached.
        folder: for adapter_config.json and adapter_model.safetensors.

    Raises:
        DeltaError: PEFT has no adapter that does the same, or the model is not the delta's base.
        AttachError: something is attached to the model.
    """
    model = bare(model)
    method, writer = _writer(delta)
    with attached(model, delta):  # proves that the delta belongs to this model
        plan = attachment(model).plan
    body = writer(method, placed(delta, plan), model)
    head = write_head(delta, model)
    config = {
        "base_model_name_or_path": delta.base.name or None,
        "inference_mode": True,
        **head.fields,
        **body.fields,
    }
    return write_adapter(Path(folder), config, head.tensors | body.tensors)


def _writer(delta: Delta) -> tuple[Method, Writer]:
    """The one method of the delta's recipe and what writes it. Refuses what PEFT cannot say."""
    if delta.pooling is not None:
        raise DeltaError(
            f"pooling={delta.pooling!r} cannot be written: PEFT runs the model's own class, which "
            "does not pool so; train with the class's own pooling"
        )
    method, *more = delta.recipe
    known = ", ".join(cls.__name__ for cls in WRITERS)
    if delta.recipe.narrowed:
        raise DeltaError(f"{delta.recipe} trained a subset, which a PEFT adapter cannot hold; merge it instead")
    if more:
        raise DeltaError(
            f"{delta.recipe} is a sum, and a PEFT adapter holds one method ({known}); merge the delta, or train one "
            "part on a base into which the other is merged"
        )
    if type(method) not in WRITERS or not isinstance(method, Method):
        reason = REASONS.get(type(method), "no conversion is known")
        raise DeltaError(f"{method} has no counterpart in PEFT: {reason}; {known} have")
    return method, WRITERS[type(method)]


def _by_saved_name(plan: Plan, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Saved name -> tensor, from tensors named by site and symbol; those of the head keep their names."""
    named = {name: values[name] for name, _ in plan.head}
    for entry in plan.entries:
        for term, name, _ in entry.trained():
            named[name] = values[f"{entry.site.name}.{term}"]
    return named


def _add_head(adapter: AdapterFile, model: nn.Module, plan: Plan, values: dict[str, Tensor]) -> list[str]:
    """Add the head's tensors to `values`; gives the names that the file lacks."""
    own, head = model.state_dict(), dict(plan.head)
    for name, tensor in adapter.saved.items():
        if name in head:
            if tuple(tensor.shape) != head[name]:
                raise DeltaError(
                    f"{adapter.source}: {name} has shape {tuple(tensor.shape)}, the model's head "
                    f"{head[name]}; load the model with as many labels as the adapter has"
                )
            values[name] = tensor
        elif name not in values and (name not in own or not _same(tensor, own[name])):
            raise DeltaError(
                f"{adapter.source}: modules_to_save holds {name}, which differs from the base and is neither in the "
                f"model's head ({', '.join(head) or 'it has none'}) nor one of its parameters"
            )
    missing = [name for name in head if name not in values]
    values.update((name, own[name]) for name in missing)
    if missing:
        warnings.warn(
            f"{adapter.source} has no values for {', '.join(missing)}: they are this model's own, as in "
            "PEFT. If they are random, the adapter was saved without its head (modules_to_save)",
            MissingHeadWarning,
            stacklevel=3,
        )
    return missing


def _saved_whole(adapter: AdapterFile, model: nn.Module, plan: Plan) -> list[str]:
    """Names of the parameters beside the head that the file brings whole; none if all are those of the base."""
    head = dict(plan.head)
    own = dict(model.named_parameters())
    names = [name for name in adapter.saved if name in own and name not in head]
    for name in names:
        if adapter.saved[name].shape != own[name].shape:
            raise DeltaError(
                f"{adapter.source}: {name} has shape {tuple(adapter.saved[name].shape)}, the model's "
                f"{tuple(own[name].shape)}"
            )
    return names if any(not _same(adapter.saved[name], own[name]) for name in names) else []


def _covering(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Paths of the largest modules of which all parameters are among these, and of parameters whose module is not."""
    wanted, found = set(names), dict[str, None]()
    for name in wanted:
        best, path = name, name.rpartition(".")[0]
        while path and {f"{path}.{part}" for part, _ in model.get_submodule(path).named_parameters()} <= wanted:
            best, path = path, path.rpartition(".")[0]
        found[best] = None
    return tuple(sorted(found))


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.double(), other.cpu().double())
