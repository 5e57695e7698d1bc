"""What is attached to a model: the originals that were set aside and the masters that stand in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.dtypes import master_dtype
from smidgen.common.errors import AttachError
from smidgen.common.module_modes import renew_caches
from smidgen.common.wrappers import bare, check_model
from smidgen.methods.base import Method
from smidgen.planning.entry import INDICES, START, Entry
from smidgen.planning.plans import Plan
from smidgen.ports.edit import Edit, Edits
from smidgen.ports.in_place.held_state import Held, persistent_buffers
from smidgen.ports.in_place.master_weights import Low
from smidgen.ports.in_place.parameter_port import Swap, low_modules, plug_in, take_back
from smidgen.ports.in_place.sparse_values import SparseValues, has_parts, parts_in
from smidgen.recipe.recipe import Recipe
from smidgen.sites.site import module_at

MIXTURE = "_smidgen_mixture"  # attribute of a model on which several results stand


@dataclass
class Attachment:
    """The record that `attach` leaves on the model (as `model._smidgen`) and `detach` takes back."""

    plan: Plan
    swaps: list[Swap]
    edits: list[tuple[str, str]]  # (module path, key) of each edit
    flags: dict[str, bool]  # requires_grad of every base parameter before
    dtype: torch.dtype  # the base's
    added: dict[str, nn.Parameter] = field(default_factory=dict)
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)  # name of a tensor -> its owners
    handles: list[RemovableHandle] = field(default_factory=list)
    guarded: list[str] = field(default_factory=list)  # paths of modules that may read a child with edits
    held: Held = field(default_factory=lambda: Held([], [], []))
    memory: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)  # of events, by index in the recipe
    active: bool = True
    new: tuple[str, ...] | None = None  # what the base's checkpoint lacked, None if none was read

    def plug(self, model: nn.Module) -> None:
        """Put the masters in."""
        plug_in(model, self.swaps)
        self._switch(model, True)

    def unplug(self, model: nn.Module) -> None:
        """Put the very original Parameters back, moved to where the module now lives."""
        take_back(model, self.swaps)
        self._switch(model, False)

    def _switch(self, model: nn.Module, on: bool) -> None:
        for path, key in self.edits:
            edit_at(model, path, key).enabled = on
        for owners in self.parts.values():
            self._part(model, owners[0]).enabled = on
        for path, _, _ in self.low_modules():
            module_at(model, path)._casting = on  # type: ignore[assignment]
        self.active = on
        renew_caches(model)

    def _part(self, model: nn.Module, owner: str) -> SparseValues:
        path, _, term = owner.rpartition(".")
        module = module_at(model, path)
        assert has_parts(module)
        return parts_in(module.subsets)[term]

    def whole_parts(self, model: nn.Module) -> dict[str, Tensor]:
        """Name -> whole tensor, in master precision and with gradient, of every existing tensor trained in part."""
        base = dict(self.base_tensors(model))
        return {
            name: self._part(model, owners[0]).whole(base[name].to(master_dtype(base[name].dtype)))
            for name, owners in self.parts.items()
        }

    def subset_modules(self) -> dict[str, None]:
        """Paths of existing modules that hold parts."""
        return dict.fromkeys(owner.rpartition(".")[0] for owners in self.parts.values() for owner in owners)

    def fixed(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Saved name and tensor of what a file needs beside the trained values: indices, starts drawn at random."""
        for entry in self.plan.entries:
            if not (entry.subsets or entry.kept or entry.shared_indices):
                continue
            path, key = entry.site.path, entry.key
            for term, subset in entry.subsets.items():
                if len(subset.indices):
                    yield entry.name(term) + INDICES, subset.indices.to(torch.int32)
                if subset.start:
                    yield entry.name(term) + START, getattr(edit_at(model, path, key), term).detach()
            for symbol in entry.kept:
                yield entry.name(symbol) + START, getattr(edit_at(model, path, key), f"{symbol}0")
            for symbol, _ in entry.shared_indices:
                yield entry.name(symbol) + INDICES, getattr(edit_at(model, path, key), symbol).to(torch.int32)

    def low_modules(self) -> list[Low]:
        """Modules of a low-precision base that hold masters."""
        return low_modules(self.plan, self.swaps)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Saved name and master of every trained tensor, head included, in the plan's order."""
        masters = {swap.name: swap.master for swap in self.swaps if swap.trained}
        for name in self.plan.shapes:
            yield name, masters[name] if name in masters else self.added[name]

    def added_by(self, index: int) -> list[Entry]:
        """Where a term of the recipe adds tensors of a site's own."""
        return [entry for entry in self.plan.entries if entry.index == index and entry.added and not entry.owns_shared]

    def tensors_of(self, entry: Entry) -> dict[str, nn.Parameter]:
        """Symbol -> what is trained, of an entry that adds tensors."""
        return {term: self.added[name] for term, name, _ in entry.trained()}

    @property
    def result(self) -> Recipe:
        """The recipe that what is saved belongs to."""
        terms = (term.settled() if isinstance(term, Method) else term for term in self.plan.recipe)
        return replace(self.plan.recipe, terms=tuple(terms))

    def results(self) -> Iterator[tuple[str, Tensor]]:
        """Saved name and tensor of all that training gave: `trained`, settled where a method says so."""
        settled = {entry.name(term): entry for entry in self.plan.entries if entry.settled for term, _ in entry.terms}
        values, seen = dict(self.trained()), set[str]()
        for name, tensor in values.items():
            entry = settled.get(name)
            if entry is None:
                yield name, tensor
            elif entry.name("") not in seen:
                seen.add(entry.name(""))
                found = entry.method.settle({term: values[entry.name(term)] for term, _ in entry.terms}, entry.site)
                yield from ((entry.name(term), value) for term, value in found.items())

    def check_held(self) -> None:
        """Raises AttachError if a module or parameter of the base was replaced, or a buffer changed from outside."""
        originals = {owner: swap for swap in self.swaps for owner in swap.owners}
        now = {n: s.master if self.active else s.original for n, s in originals.items()}
        self.held.check_parts(self.plan.recipe, now)
        self.held.check_buffers(self.plan.recipe)

    def base_tensors(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of the untouched base, by its first name."""
        originals = {owner: swap.original for swap in self.swaps for owner in swap.owners}
        for name, parameter in model.named_parameters():
            if name in self.flags:
                yield name, originals.get(name, parameter)


def edit_at(model: nn.Module, path: str, key: str) -> Edit:
    """The edit that stands at a module under a key."""
    edits = module_at(model, path).edits
    assert isinstance(edits, Edits)
    edit = edits[key]
    assert isinstance(edit, Edit)
    return edit


def attachment(model: nn.Module) -> Attachment:
    """The record on an attached model. Raises AttachError if nothing is attached."""
    record = bare(model).__dict__.get("_smidgen")
    if not isinstance(record, Attachment):
        raise AttachError(
            f"nothing is attached to this {type(bare(model)).__name__}; call smidgen.attach(model, recipe)"
        )
    return record


def check_masters(model: nn.Module) -> None:
    """Raises AttachError if the masters were cast with the model, which ruins them."""
    record = attachment(model)
    wanted = master_dtype(record.dtype)
    for name, parameter in record.trained():
        if parameter.dtype != wanted:
            raise AttachError(
                f"the attached model was cast to {str(parameter.dtype)[6:]} ({name}); trained values are {wanted} "
                "masters: detach, cast the base, attach again (under Trainer, leave bf16_full_eval off)"
            )


def is_attached(model: nn.Module) -> bool:
    """Whether something is attached to the model."""
    return "_smidgen" in bare(model).__dict__


def refuse_attached(model: nn.Module) -> None:
    """Raises AttachError if something is attached to the model, or if nothing can be (see `check_model`)."""
    check_model(model)
    if MIXTURE in bare(model).__dict__:
        raise AttachError("several results are attached already; leave the block of smidgen.attached_rows first")
    if is_attached(model):
        raise AttachError(f"{attachment(model).plan.recipe} is attached already; detach it first")


def base_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> persistent buffer of the untouched base, whether something is attached or not."""
    model = bare(model)
    if is_attached(model):
        return {buffer.name: buffer.value for buffer in attachment(model).held.buffers}
    return persistent_buffers(model)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Saved name -> master of every trained tensor of an attached model, head included."""
    return dict(attachment(model).trained())


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of the untouched base, whether something is attached or not."""
    model = bare(model)
    if is_attached(model):
        return dict(attachment(model).base_tensors(model))
    return dict(model.named_parameters())
