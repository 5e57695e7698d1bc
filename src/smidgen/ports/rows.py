"""Several results of one plan on one model, a row of a batch each: what a mixed batch is computed with.

Edits hold the tensors of all results, stacked, and `Edit.by_row` picks each row's. A norm, a bias and a head's linear
map are trained in place; by row they are

    norm:   something * (gain_row + offset) + bias_row,  where the module computes with a gain of 1 and no bias
    bias:   (module without its bias) + bias_row
    linear: W_row x + b_row

as `rows_from` of the pass says which result a row belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.errors import AttachError
from smidgen.common.hook_types import Args, first_of, like
from smidgen.methods.base import Method
from smidgen.planning.row import Row
from smidgen.ports.attachment_record import Attachment, attachment
from smidgen.ports.builtin_ports import port_of
from smidgen.ports.edit import Edit
from smidgen.ports.forward_state import check_rows, state
from smidgen.sites.site import LinearSite, NormSite, module_at
from smidgen.sites.weight_view import channels_back, channels_last

Tables = Mapping[str, Tensor]


def why_no_rows(model: nn.Module) -> dict[str, str]:
    """Method -> why rows of one batch cannot have different results of it, for what is attached; empty if they can."""
    record = attachment(model)
    found: dict[str, str] = {}
    for row in record.plan.rows:
        why = _of_edit(model, row) if row.added else _in_place(row)
        if why:
            found.setdefault(str(row.method), why)
    for name, _ in record.plan.head:
        module = model.get_submodule(name.rpartition(".")[0])
        if type(module) is not nn.Linear:
            found.setdefault("the head", f"{type(module).__name__} at {name} is no plain linear map")
    return found


def _of_edit(model: nn.Module, row: Row) -> str | None:
    method: Method = row.method
    if row.owns_shared:
        return "its sites share tensors"
    if row.subsets or row.kept or row.routes:
        return "a file holds more than its trained tensors, such as indices or a start"
    edits: Any = module_at(model, row.site.path).edits
    return (
        port_of(row.site).why_no_rows(edits[row.key]) if method.settled() == method else "it is saved as another method"
    )


def _in_place(row: Row) -> str | None:
    site, terms = row.site, {term for term, _ in row.terms}
    if row.subsets:
        return "parts of tensors are trained, at places of their own"
    if isinstance(site, NormSite) and site.affine and terms <= {site.gain, site.bias}:
        return None
    if isinstance(site, LinearSite) and terms == {site.bias} and site.rows is None:
        return None
    return f"{', '.join(sorted(terms))} of {type(site).__name__} are trained in place"


def stack_results(model: nn.Module, results: Sequence[Mapping[str, Tensor]]) -> list[RemovableHandle]:
    """Let what is attached hold several results. Taken away by `remove`, once the handles are.

    Args:
        results: of each, saved name -> tensor, as in its file.

    Raises:
        AttachError: a method has no form by row.
    """
    if why := why_no_rows(model):
        listed = "; ".join(f"{method}: {reason}" for method, reason in why.items())
        raise AttachError(f"rows of one batch cannot have different results of this recipe: {listed}")
    record = attachment(model)
    handles: list[RemovableHandle] = []
    with torch.no_grad():
        stacked = {name: _stacked(record, name, results) for name, _ in record.trained()}
        for row in record.plan.rows:
            if row.added:
                edit: Edit = module_at(model, row.site.path).edits[row.key]  # type: ignore[index, assignment]
                edit.tables = {term: stacked[row.name(term)] for term, _ in row.terms}
            else:
                handles.append(_place_in_place(model, row, stacked, record))
        heads: dict[str, dict[str, Tensor]] = {}
        for name, _ in record.plan.head:
            path, _, term = name.rpartition(".")
            heads.setdefault(path, {})[term] = stacked[name]
        for path, tables in heads.items():
            handles.append(module_at(model, path).register_forward_hook(partial(head_by_row, tables), prepend=True))
    return handles


def _stacked(record: Attachment, name: str, results: Sequence[Mapping[str, Tensor]]) -> Tensor:
    like = dict(record.trained())[name]
    return torch.stack([result[name].to(like) for result in results])


def _place_in_place(model: nn.Module, row: Row, stacked: Tables, record: Attachment) -> RemovableHandle:
    """The module computes with neutral terms, and a hook puts each row's in."""
    masters, site = {swap.name: swap.master for swap in record.swaps}, row.site
    assert isinstance(site, NormSite | LinearSite)  # as `why_no_rows` has seen
    tables = {term: stacked[row.name(term)] for term, _ in row.terms}
    for term in tables:
        neutral = 1 - site.offset if isinstance(site, NormSite) and term == site.gain else 0.0
        masters[row.name(term)].fill_(neutral)
    module = module_at(model, site.path)
    return module.register_forward_hook(partial(terms_by_row, site, tables), prepend=True)


def terms_by_row(site: NormSite | LinearSite, tables: Tables, module: nn.Module, args: Args, output: object) -> object:
    """Forward hook, first of all, of a norm or a map whose terms are neutral."""
    y, rest = first_of(output)
    rows = state().batch_rows()
    check_rows(y, rows, site.path)
    y = channels_last(site, y)
    shape = (len(rows), *[1] * (y.ndim - 2), -1)
    gain = tables.get(site.gain or "") if isinstance(site, NormSite) else None
    bias = tables.get(site.bias or "")
    own = module._parameters.get(site.bias) if site.bias and bias is None and gain is not None else None
    found = y
    if gain is not None:
        assert isinstance(site, NormSite)
        found = (found if own is None else found - own) * (gain[rows] + site.offset).view(shape)
        found = found if own is None else found + own
    found = found if bias is None else found + bias[rows].view(shape)
    found = channels_back(site, found.to(y.dtype))
    return like(output, found, rest)


def head_by_row(tables: Tables, module: nn.Linear, args: Args, output: Tensor) -> Tensor:
    """Forward hook of a linear map of the head: W_row x + b_row. x: (B, ..., width_in)."""
    x: Tensor = args[0]
    rows = state().batch_rows()
    check_rows(x, rows, "the head")
    weight = tables["weight"][rows].to(x.dtype) if "weight" in tables else module.weight.expand(len(rows), -1, -1)
    y = torch.einsum("b...i,boi->b...o", x, weight)
    if module.bias is None:
        return y
    bias = tables["bias"][rows].to(x.dtype) if "bias" in tables else module.bias.expand(len(rows), -1)
    return y + bias.view(len(rows), *[1] * (y.ndim - 2), -1)
