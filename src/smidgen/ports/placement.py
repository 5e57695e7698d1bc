"""Put a resolved plan on a model: masters in, edits on, hooks placed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.dtypes import base_dtype, master_dtype
from smidgen.common.errors import AttachError
from smidgen.common.hook_types import Args
from smidgen.planning.entry import Entry
from smidgen.planning.initial_values import blank, initial, shared_indices
from smidgen.planning.plans import Plan
from smidgen.planning.shared_tensors import pool_key
from smidgen.ports.attachment_record import Attachment, attachment, check_masters, edit_at, is_attached
from smidgen.ports.builtin_ports import port_of
from smidgen.ports.forward_state import close_pass, end_turn, open_pass, take_turn
from smidgen.ports.in_place.held_state import Held
from smidgen.ports.in_place.master_weights import drop_casts, place_casts
from smidgen.ports.in_place.parameter_port import swaps
from smidgen.ports.in_place.sparse_values import SparseValues, add_part, check_free, drop_parts
from smidgen.ports.module_port import add_guard, drop_guard
from smidgen.ports.pooling import place_pooling
from smidgen.ports.reversible import open_entries
from smidgen.sites.module_calls import never_called, read_at
from smidgen.sites.new_tensors import new_names
from smidgen.sites.quantised.maps import check_stored, read_dtypes
from smidgen.sites.quantised.originals import originals_closed
from smidgen.sites.site import module_at

SAVE_ERROR = (
    "save_pretrained on an attached model would lose the trained values on reload. Save the delta with "
    "smidgen.Delta.of(model).save(folder), or save a plain model with smidgen.merge(model).save_pretrained(folder); "
    "under Trainer, add smidgen.TrainerCallback()"
)


def place(model: nn.Module, plan: Plan, seed: int = 0, compute: bool = True) -> None:
    """Put a resolved plan on a model; `attach` without checks and the compiler reset.

    Without `compute`, no start is drawn or computed: the values are to be filled in.
    """
    owners: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        owners.setdefault(id(parameter), []).append(name)
    held, dtype = Held.of(model), base_dtype(parameters)
    flags = {name: p.requires_grad for name, p in parameters.items()}
    added = [entry for entry in plan.entries if entry.added]
    check_stored(model)
    for entry in added:
        port_of(entry.site).check(model, entry)
    with originals_closed(model):
        tensors = [initial(entry, seed, model) if compute else blank(entry) for entry in added]
    partial = {entry.name(t): s.indices for entry in plan.entries if not entry.added for t, s in entry.subsets.items()}
    parts = {name: tuple(owners[id(parameters[name])]) for name in partial}
    _check_parts(model, [owner for found in parts.values() for owner in found])
    masters = swaps(plan, parameters, owners, read_dtypes(model))
    record = Attachment(plan, masters, [], flags, dtype, parts=parts, held=held, new=new_names(model))
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    for entry, fresh in zip(added, tensors, strict=True):
        _place_edit(model, entry, fresh, record, seed)
    for path in sorted(read_at(model) & {path for path, _ in record.edits}):
        owner, _, name = path.rpartition(".")
        record.handles += add_guard(module_at(model, owner), name)
        record.guarded.append(owner)
    for name, index in partial.items():
        _place_part(model, name, index, parameters[name], record)
    if low := record.low_modules():
        record.handles += place_casts(model, low)
    record.plug(model)
    held.hold(model)
    record.handles += open_entries(model, [entry.site.path for entry in plan.entries])
    record.handles += _around_passes(model, one_at_a_time=bool(low))
    if plan.pooling is not None:
        record.handles.append(place_pooling(model, plan.pooling))
    for name, stand_in in REFUSED.items():
        if hasattr(model, name):
            model.__dict__[name] = functools.partial(stand_in, model)
    model._smidgen = record  # type: ignore[assignment]


def _check_parts(model: nn.Module, owners: Sequence[str]) -> None:
    """Raises AttachError if a tensor's module cannot have a part of it chosen."""
    idle = never_called(model) if owners else set()
    for owner in owners:
        module = module_at(model, owner.rpartition(".")[0])
        check_free(module, owner)
        if id(module) in idle:
            raise AttachError(
                f"{owner} is read and its module never called, so no part of it can be chosen; leave it out"
            )


def _around_passes(model: nn.Module, one_at_a_time: bool) -> list[RemovableHandle]:
    """Hooks at the beginning of each pass of the whole model, and at its end."""
    before, after = model.register_forward_pre_hook, model.register_forward_hook
    handles = [before(refuse_cast), before(refuse_changed), after(keep_buffers, always_call=True)]
    handles += [before(open_pass, prepend=True), after(close_pass, always_call=True)]
    if one_at_a_time:
        handles += [before(take_turn, prepend=True), after(end_turn, always_call=True)]
    return handles


def take_off(model: nn.Module) -> None:
    """Take off what is attached, the inverse of `place`."""
    record = attachment(model)
    record.held.release()
    record.unplug(model)
    places = {(port_of(entry.site), entry.site.path): entry.site for entry in record.plan.entries if entry.added}
    for (port, _), site in places.items():
        port.remove(model, site)
    for path in record.guarded:
        drop_guard(module_at(model, path))
    drop_casts(model, record.low_modules())
    for path in record.subset_modules():
        drop_parts(module_at(model, path))
    for handle in record.handles:
        handle.remove()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, flag in record.flags.items():
        parameters[name].requires_grad_(flag)
    for name in REFUSED:
        model.__dict__.pop(name, None)
    model.__dict__.pop("_smidgen")


def _place_edit(model: nn.Module, entry: Entry, fresh: Mapping[str, Tensor], record: Attachment, seed: int) -> None:
    """Puts one entry's edit on its module with fresh tensors, and notes hooks, edits and trained parameters."""
    device = next(module_at(model, entry.site.path).parameters()).device
    fresh = {k: v.to(device=device, dtype=master_dtype(record.dtype)) for k, v in fresh.items()}
    port, chosen = port_of(entry.site), {term: subset.indices for term, subset in entry.subsets.items()}
    edit = port.edit(entry.method, entry.site, fresh, chosen)
    if pool := pool_key(entry):
        edit.share(edit_at(model, "", pool), {k: v.to(device) for k, v in shared_indices(entry, seed).items()})
    record.handles += port.place(model, entry.site, entry.key, edit)
    if not entry.owns_shared:
        record.edits.append((entry.site.path, entry.key))
    record.added.update((name, edit.leaf(term)) for term, name, _ in entry.trained())


def _place_part(model: nn.Module, name: str, index: Tensor, parameter: nn.Parameter, record: Attachment) -> None:
    part = SparseValues(parameter, index, master_dtype(parameter.dtype))
    for owner in record.parts[name]:
        path, _, term = owner.rpartition(".")
        add_part(module_at(model, path), term, part)
    record.added[name] = part.values


def refuse_cast(model: nn.Module, args: Args) -> None:
    """Forward pre-hook of an attached model: masters that were cast are ruined, and that must not pass unseen."""
    check_masters(model)


def refuse_changed(model: nn.Module, args: Args) -> None:
    """Forward pre-hook of an attached model: neither must modules that were replaced, nor buffers that were written."""
    if not torch.compiler.is_compiling():
        attachment(model).check_held()
        attachment(model).held.begin()


def keep_buffers(model: nn.Module, args: Args, output: object) -> None:
    """Forward hook of an attached model (always called)."""
    if not torch.compiler.is_compiling() and is_attached(model):
        attachment(model).held.end()


def refuse_save(model: nn.Module, *args: object, **kwargs: object) -> None:
    """Stands in for save_pretrained on an attached model."""
    raise AttachError(SAVE_ERROR)


def refuse_resize(model: Any, new_num_tokens: int | None = None, *args: object, **kwargs: object) -> object:
    """Stands in for resize_token_embeddings on an attached model; the size that there is may be asked for."""
    found = model.get_input_embeddings()
    if new_num_tokens in (None, found.weight.shape[0]) and not args and not kwargs.get("pad_to_multiple_of"):
        return found
    raise AttachError(
        f"the embeddings cannot be resized to {new_num_tokens} rows while {attachment(model).plan.recipe} is attached: "
        "what is trained belongs to the old table; detach, resize, attach again"
    )


REFUSED = {"save_pretrained": refuse_save, "resize_token_embeddings": refuse_resize}
