"""Deltas: several trained results beside one model, one of them in use."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from smidgen.common.dtypes import base_dtype
from smidgen.common.errors import AttachError, DeltaError, nearest
from smidgen.delta.arithmetic.sums import Sum
from smidgen.delta.attaching import check_places, fill_values, put, remove
from smidgen.delta.compatibility import check_values, fitted
from smidgen.delta.delta import Delta
from smidgen.planning.plans import Plan
from smidgen.ports.attachment_record import (
    Attachment,
    attachment,
    base_tensors,
    check_masters,
    is_attached,
    refuse_attached,
    trained_parameters,
)


@dataclass(frozen=True)
class CheckedDelta:
    """A delta, its plan, and the dtype of the base that it was checked against."""

    delta: Delta
    plan: Plan
    dtype: torch.dtype


class Deltas(MutableMapping[str, Delta]):
    """Deltas of one base by name, switched without loading: `deltas["a"] = "runs/a"; deltas.use("a")`.

    A delta is checked against the base when it is put in (fingerprint, tensors, head, every place that it edits), and
    not again. The one in use is attached, frozen: `detach`, `disabled`, `merge` and `Delta.of` work, `attach` and `fit`
    are refused. Values go from the delta to the model and never back. For one thread at a time.

    Attributes:
        model: the base, changed in place by `use`.

    Raises:
        AttachError: something is attached to the model already; a name in use is deleted or put in again.
        DeltaError: a name that is no string; a delta of another base, or with a head of another shape.
        KeyError: `deltas[name]` of a name that is not there.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._entries: dict[str, CheckedDelta] = {}
        self._record: Attachment | None = None
        self._name: str | None = None
        self._waiting: list[str | None] = []
        self._check_free()

    @property
    def active(self) -> str | None:
        """Name of the delta in use; None for the untouched base, or after a `detach` from elsewhere."""
        mine = self._record is not None and is_attached(self.model)
        return self._name if mine and attachment(self.model) is self._record else None

    def use(self, name: str | None) -> None:
        """Let the model do what a delta does; None for the untouched base, with its very Parameter objects.

        Train or eval mode stays as it is. Compiled code is compiled again, unless the recipe is the same as before.

        Raises:
            DeltaError: no delta has this name.
            AttachError: something else is attached, the model was cast, `disabled` is under way; or a place cannot be
                edited any more, which leaves the untouched base.
        """
        entry = None if name is None else self._entry(name)
        self._check_free()
        if entry is not None:
            self._check_dtype(entry, name)
        with torch.inference_mode(False):  # tensors of that mode could not be filled anew outside of it
            self._switch(entry)
        self._name = name

    @contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        """`use` inside, and what was in use before afterwards, also after an error."""
        before = self.active
        self.use(name)
        self._waiting.append(before)
        try:
            yield self.model
        finally:
            self._waiting.pop()
            self.use(before)

    def __setitem__(self, name: str, what: Delta | Sum[Delta] | str | os.PathLike[str]) -> None:
        """Put in a Delta, the folder or hub id of one, or a sum of them."""
        if not isinstance(name, str):
            raise DeltaError(f"a delta's name is a string, not {name!r}")
        self._check_idle(name)
        if not isinstance(what, Delta | Sum | str | os.PathLike):
            raise DeltaError(
                f"{name!r} is of type {type(what).__name__}; put in a Delta, its folder or hub id, or a sum"
            )
        found = what if isinstance(what, Delta | Sum) else Delta.load(what)
        self._check_free()
        with torch.inference_mode(False):
            entry = self._like(found) if isinstance(found, Delta) else None
            if entry is None:
                with self.using(None):
                    entry = self._new(found)
        self._entries[name] = entry

    def _new(self, found: Delta | Sum[Delta]) -> CheckedDelta:
        """The entry of a delta, with a plan of its own, which is tried on the model."""
        delta = found.on(self.model) if isinstance(found, Sum) else found
        plan = fitted(self.model, delta, verify=delta is found)  # a sum has done so
        check_places(self.model, plan, delta)  # a place that cannot be edited is told now, not at a switch
        return CheckedDelta(delta, plan, base_dtype(base_tensors(self.model)))

    def _like(self, delta: Delta) -> CheckedDelta | None:
        """The entry of a delta that differs from one that is here in values only: the model needs no other look."""
        dtype = base_dtype(base_tensors(self.model))
        for entry in reversed(self._entries.values()):
            if entry.dtype == dtype and not entry.plan.chosen and _same_layout(entry.delta, delta):
                check_values(self.model, delta)
                return CheckedDelta(delta, entry.plan, dtype)
        return None

    def __getitem__(self, name: str) -> Delta:
        return self._entries[name].delta

    def __delitem__(self, name: str) -> None:
        self._check_idle(name)
        del self._entries[name]

    def clear(self) -> None:
        """Let go of all, or of none if one is in use."""
        for name in self:
            self._check_idle(name)
        self._entries.clear()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Deltas({', '.join(map(repr, self)) or 'none'}; in use: {self.active!r})"

    def _entry(self, name: str) -> CheckedDelta:
        if name not in self._entries:
            raise DeltaError(f"no delta is called {name!r}; found: {', '.join(self) or 'none'}{nearest(name, self)}")
        return self._entries[name]

    def _check_free(self) -> None:
        """Only what stands here may be attached, and in a state to be taken off."""
        if self.active is None:
            refuse_attached(self.model)
            return
        if not attachment(self.model).active:
            raise AttachError("no switch inside smidgen.disabled(model), which will put back what it took off")
        check_masters(self.model)

    def _check_dtype(self, entry: CheckedDelta, name: str | None) -> None:
        found = base_dtype(base_tensors(self.model))
        if found != entry.dtype:
            raise AttachError(
                f"the base was cast to {str(found)[6:]} after {name!r} was checked against it in "
                f"{str(entry.dtype)[6:]}; put it in again"
            )

    def _check_idle(self, name: str) -> None:
        if name in (self.active, *self._waiting):
            raise AttachError(f"{name!r} is in use; call use(None), or leave the block that uses it, first")

    def _switch(self, entry: CheckedDelta | None) -> None:
        """Put an entry on the model, or none; values alone where the same tensors are attached already."""
        if entry is not None and self.active is not None and _alike(attachment(self.model).plan, entry.plan):
            fill_values(self.model, entry.delta)
            return
        if self.active is not None:
            remove(self.model)
        if entry is not None:
            put(self.model, entry.plan, entry.delta)
            self._record = attachment(self.model)
            for parameter in trained_parameters(self.model).values():
                parameter.requires_grad_(False)  # a step would be lost at the next switch


def _same_layout(one: Delta, other: Delta) -> bool:
    """Whether two deltas have tensors of the same names and shapes from the same recipe, head and pooling."""
    if (one.pooling, one.head, one.recipe) != (other.pooling, other.head, other.recipe):
        return False
    return _shapes(one) == _shapes(other)


def _shapes(delta: Delta) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in delta.tensors.items()}


def _alike(now: Plan, then: Plan) -> bool:
    """Whether the same tensors are trained whole, so that values are all that differs."""
    return now == then and not then.chosen
