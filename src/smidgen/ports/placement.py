"""Put a resolved plan on a model: masters in, edits on, hooks placed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.common.dtypes import base_dtype, master_dtype
from smidgen.common.errors import AttachError
from smidgen.planning.initial_values import blank, initial, routes
from smidgen.planning.plans import Plan
from smidgen.planning.row import Row
from smidgen.planning.shared_tensors import pool_key
from smidgen.ports.attachment_record import Attachment, Swap, attachment, check_masters, is_attached
from smidgen.ports.attention_port import KeyValueEdits, add_keys, check_attention, drop_keys
from smidgen.ports.generation_cache import place_generation
from smidgen.ports.held_state import Held
from smidgen.ports.master_weights import place_casts
from smidgen.ports.module_port import Edit, add_edit, add_guard, add_pool, check_editable, check_pool, drop_edits
from smidgen.ports.pooling import place_pooling
from smidgen.ports.prompt_port import add_tokens, check_tokens
from smidgen.ports.sparse_values import SparseValues, add_part, check_free
from smidgen.ports.sublayer_port import add_tap
from smidgen.sites.module_calls import never_called, read_at
from smidgen.sites.new_tensors import new_names
from smidgen.sites.site import InputSite, KeyValueSite, NormSite, Sublayer, module_at

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
    added = [row for row in plan.rows if row.added]
    for row in added:
        check_at(model, row)
    tensors = [initial(row, seed, model) if compute else blank(row) for row in added]
    partial = {row.name(t): s.indices for row in plan.rows if not row.added for t, s in row.subsets.items()}
    parts = {name: tuple(owners[id(parameters[name])]) for name in partial}
    idle = never_called(model) if parts else set()
    for owner in (owner for found in parts.values() for owner in found):
        module = module_at(model, owner.rpartition(".")[0])
        check_free(module, owner)
        if id(module) in idle:
            raise AttachError(
                f"{owner} is read and its module never called, so no part of it can be chosen; leave it out"
            )
    known: dict[str, Any] = {"parts": parts, "held": held, "new": new_names(model)}
    record = Attachment(plan, _swaps(plan, parameters, owners), [], flags, dtype, **known)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    for row, fresh in zip(added, tensors, strict=True):
        _place_edit(model, row, fresh, record, seed)
    for path in sorted(read_at(model) & {path for path, _ in record.edits}):
        owner, _, name = path.rpartition(".")
        record.handles += add_guard(module_at(model, owner), name)
        record.guarded.append(owner)
    for name, index in partial.items():
        _place_part(model, name, index, parameters[name], record)
    record.handles += place_casts(model, record.low_modules())
    record.plug(model)
    held.hold(model)
    record.handles.append(model.register_forward_pre_hook(refuse_cast))
    record.handles.append(model.register_forward_pre_hook(refuse_changed))
    record.handles.append(model.register_forward_hook(keep_buffers, always_call=True))
    if plan.pooling is not None:
        record.handles.append(place_pooling(model, plan.pooling))
    for name, stand_in in REFUSED.items():
        if hasattr(model, name):
            model.__dict__[name] = functools.partial(stand_in, model)
    model._smidgen = record  # type: ignore[assignment]


def check_at(model: nn.Module, row: Row) -> None:
    """Raises AttachError, before anything is touched, if a row's module cannot carry its edit."""
    module = module_at(model, row.site.path)
    if row.owns_shared:
        check_pool(module, row.sites, row.method)
    elif isinstance(row.site, KeyValueSite):
        check_attention(module, row.site)
    elif isinstance(row.site, InputSite):
        check_tokens(model, row.site, row.method)
    else:
        check_editable(module, row.site, row.method)


def drop_at(module: nn.Module) -> None:
    """Take all edits off a module."""
    if isinstance(module._modules["edits"], KeyValueEdits):
        drop_keys(module)
    else:
        drop_edits(module)


def _place_edit(model: nn.Module, row: Row, fresh: Mapping[str, Tensor], record: Attachment, seed: int) -> None:
    module = module_at(model, row.site.path)
    device = next(module.parameters()).device
    fresh = {k: v.to(device=device, dtype=master_dtype(record.dtype)) for k, v in fresh.items()}
    edit = Edit(row.method, row.site, fresh, {term: subset.indices for term, subset in row.subsets.items()})
    if pool := pool_key(row):
        owner: Any = model
        edit.share(owner.edits[pool], {k: v.to(device) for k, v in routes(row, seed).items()})
    if row.owns_shared:
        add_pool(model, row.key, edit)
    elif isinstance(row.site, KeyValueSite):
        add_keys(module, row.key, edit)
    elif isinstance(row.site, InputSite):
        record.handles += add_tokens(model, row.site, row.key, edit)
        place_generation(model, row.site.path)
    else:
        add_edit(module, row.key, edit)
    if (
        isinstance(row.site, Sublayer)
        and edit.reads_entry
        and (handle := add_tap(module_at(model, row.site.entry), module))
    ):
        record.handles.append(handle)
        record.tapped += [row.site.entry, row.site.path]
    if not row.owns_shared:
        record.edits.append((row.site.path, row.key))
    record.added.update((name, edit.leaf(term)) for term, name, _ in row.trained())


def _place_part(model: nn.Module, name: str, index: Tensor, parameter: nn.Parameter, record: Attachment) -> None:
    part = SparseValues(parameter, index, master_dtype(parameter.dtype))
    for owner in record.parts[name]:
        path, _, term = owner.rpartition(".")
        add_part(module_at(model, path), term, part)
    record.added[name] = part.values


def _swaps(plan: Plan, parameters: Mapping[str, nn.Parameter], owners: Mapping[int, list[str]]) -> list[Swap]:
    names = [row.name(t) for row in plan.rows if not row.added for t, _ in row.terms if t not in row.subsets]
    trained = [*names, *(name for name, _ in plan.head)]
    # A norm in a low-precision base computes in float32 with both of its terms, even if one of them is frozen.
    norms = {
        f"{row.site.path}.{term}": None
        for row in plan.rows
        if isinstance(row.site, NormSite) and not row.added
        for term, _ in row.site.terms
    }
    frozen = [name for name in norms if name not in trained and parameters[name].element_size() < 4]
    swaps = []
    for name in (*trained, *frozen):
        original = parameters[name]
        master = nn.Parameter(
            original.detach().to(master_dtype(original.dtype), copy=True), requires_grad=name in trained
        )
        swaps.append(Swap(name, tuple(owners[id(original)]), original, master, name in trained))
    return swaps


def refuse_cast(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of an attached model: masters that were cast are ruined, and that must not pass unseen."""
    check_masters(model)


def refuse_changed(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of an attached model: neither must modules that were replaced, nor buffers that were written."""
    if not torch.compiler.is_compiling():
        attachment(model).check_held()
        attachment(model).held.begin()


def keep_buffers(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of an attached model (always called)."""
    if not torch.compiler.is_compiling() and is_attached(model):
        attachment(model).held.end()


def refuse_save(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Stands in for save_pretrained on an attached model."""
    raise AttachError(SAVE_ERROR)


def refuse_resize(model: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    """Stands in for resize_token_embeddings on an attached model; the size that there is may be asked for."""
    found = model.get_input_embeddings()
    if new_num_tokens in (None, found.weight.shape[0]) and not args and not kwargs.get("pad_to_multiple_of"):
        return found
    raise AttachError(
        f"the embeddings cannot be resized to {new_num_tokens} rows while {attachment(model).plan.recipe} is attached: "
        "what is trained belongs to the old table; detach, resize, attach again"
    )


REFUSED = {"save_pretrained": refuse_save, "resize_token_embeddings": refuse_resize}
