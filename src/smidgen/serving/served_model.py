"""ServedModel: one base of one class, the layouts that stand on it, and deltas as its tenants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from math import prod
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smidgen.common.dtypes import LOW, master_dtype
from smidgen.common.errors import AttachError, DeltaError
from smidgen.data.kinds.base import Collate, TaskKind
from smidgen.data.processor import Processor
from smidgen.delta.attaching import attached
from smidgen.delta.compatibility import check_values, fitted
from smidgen.delta.delta import Delta
from smidgen.inference.sample_inputs import fitting_inputs
from smidgen.planning.entry import INDICES, START, Shape
from smidgen.planning.initial_values import initial
from smidgen.planning.plans import Plan
from smidgen.planning.prompt_positions import prompt_length
from smidgen.planning.resolution import resolve
from smidgen.ports.attachment_record import refuse_attached
from smidgen.ports.by_row.heads import padded
from smidgen.ports.by_row.mixture import Mixture
from smidgen.ports.forward_state import Mix, RowBlock, mixed
from smidgen.ports.in_place.shared_parameters import shared_copy
from smidgen.serving.tenants import Profile, RowLayout, Tenant
from smidgen.sites.site import InputSite
from smidgen.sites.task_head import takes_positions

# of a row in a mixed batch against its delta alone, relative to the largest output; low precision rounds on other ways
TOLERANCE, LOW_TOLERANCE = 1e-4, 5e-2
Signature = tuple[object, ...]


class ServedModel:
    """A base that answers for many deltas.

    The model given stays untouched: edits stand on a second one of the same values in memory, and deltas are tried on
    a third (`plain`). `lock` is held while rows are computed, and while a layout is put on. `forward_seconds` are those
    inside of the model, `writes` is whether it was seen to write texts.

    Raises:
        AttachError: something is attached to the model.
    """

    def __init__(self, model: PreTrainedModel, processor: Processor) -> None:
        refuse_attached(model)
        self.processor, self.lock = processor, RLock()
        self.plain = shared_copy(model)
        self.plain.eval()
        self.mixture = Mixture(shared_copy(self.plain))
        self.model: Any = self.mixture.model
        self.forward_seconds, self.writes = 0.0, False
        self._layouts: dict[str, RowLayout | None] = {}
        self._count = 0
        self._known: set[Signature] = set()
        self._collators: dict[str, Collate] = {}
        self._sample: Mapping[str, Tensor] | None = None

    def collator(self, kind: TaskKind) -> Collate:
        """What makes a batch of a kind's examples."""
        if kind.name not in self._collators:
            self._collators[kind.name] = kind.collator(self.processor, model=self.plain)
        return self._collators[kind.name]

    @cached_property
    def takes_positions(self) -> bool:
        """Whether positions of tokens are among its inputs; asked of models that write texts alone."""
        return takes_positions(self.plain)

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return next(self.plain.parameters()).device

    def tenant(self, name: str, delta: Delta) -> Tenant:
        """A delta's values as rows take them. The first delta of a recipe is compared with what it gives alone.

        Raises:
            DeltaError: it belongs to another base, or a tensor is missing, unexpected or of another shape.
            AttachError: rows of one batch cannot have different results of its recipe.
        """
        signature, whole = _signature(delta), str(delta.recipe.whole)
        with self.lock:
            if signature in self._known:
                check_values(self.plain, delta)
                return self._tenant(name, delta, self._layouts[whole])
            plan = self._fitted(delta)
            if whole not in self._layouts:
                self._layouts[whole] = self._proven(name, delta, plan)
            self._known.add(signature)
            return self._tenant(name, delta, self._layouts[whole])

    def _proven(self, name: str, delta: Delta, plan: Plan) -> RowLayout | None:
        """A new layout on the model, of which rows are seen to be computed as alone; None for a head alone."""
        if plan.recipe.narrowed:
            plan = resolve(self.plain, delta.recipe.whole, delta.pooling, delta.head)
        key = f"layout{self._count}"
        self._count += 1
        self.mixture.add(key, plan)
        try:
            layout = self._layout(key, plan)
            self._prove(delta, self._tenant(name, delta, layout))
        except Exception:
            self.mixture.remove(key)
            raise
        return layout

    def _fitted(self, delta: Delta) -> Plan:
        """The plan of a delta, whose head may have as many outputs as it likes."""
        own = dict(self.plain.named_parameters())
        head: dict[str, Tensor] = {}
        for name in delta.head:
            given = delta.tensors[name]
            if name not in own or own[name].shape[1:] != given.shape[1:]:
                found = tuple(own[name].shape) if name in own else "no such tensor"
                raise DeltaError(
                    f"the delta's head has {name} of {tuple(given.shape)}, {type(self.plain).__name__} has {found}"
                )
            head[name] = own[name]
        return fitted(self.plain, replace(delta, tensors={**delta.tensors, **head}))

    def _layout(self, key: str, plan: Plan) -> RowLayout | None:
        """Where the values of a plan's tensors lie in a row of numbers, and what they start from."""
        places, offset, start = dict[str, tuple[int, Shape]](), 0, list[Tensor]()
        for entry in plan.entries:
            fresh = initial(entry, 0) if entry.added else {}
            for term, name, shape in entry.trained():
                places[name] = offset, shape
                offset += prod(shape)
                start.append(fresh[term] if entry.added else self.plain.get_parameter(name).detach())
        if not places:
            return None
        dtype = master_dtype(next(self.plain.parameters()).dtype)
        base = torch.cat([value.flatten().to(self.device, dtype) for value in start])
        prompt = sum(prompt_length(e.method, site) for e in plan.entries if isinstance(site := e.site, InputSite))
        return RowLayout(key, plan, places, offset, base, prompt)

    def _tenant(self, name: str, delta: Delta, layout: RowLayout | None) -> Tenant:
        head = {n: delta.tensors[n].to(self.device) for n in delta.head}
        profile, values, places = Profile.of(delta), torch.empty(0), None
        if layout is not None and not delta.recipe.narrowed:
            values = torch.cat([delta.tensors[n].flatten() for n in layout.places]).to(self.device)
        elif layout is not None:
            values, places = _few(delta, layout)
            values, places = values.to(self.device), None if places is None else places.to(self.device)
        return Tenant(name, profile, layout, values, places, head, delta.pooling)

    def mix(self, tenants: Sequence[Tenant | None]) -> Mix:
        """A batch's rows, those of one layout together; None is the untouched base."""
        blocks, start = [], 0
        for key, group in groupby(tenants, key=lambda tenant: "" if tenant is None else tenant.order):
            rows = list(group)
            layout = rows[0].layout if rows[0] is not None else None
            found = None if layout is None else torch.stack([row.row() for row in rows if row is not None])
            tables = {} if layout is None or found is None else layout.tables(found)
            blocks.append(RowBlock(key or None, slice(start, start + len(rows)), tables))
            start += len(rows)
        return Mix(tuple(blocks), self._heads(tenants), self._poolings(tenants))

    def _heads(self, tenants: Sequence[Tenant | None]) -> dict[str, Tensor]:
        names = dict.fromkeys(name for tenant in tenants if tenant is not None for name in tenant.head)
        found = {}
        for name in names:
            own = self.plain.get_parameter(name).detach()
            own = own.to(master_dtype(own.dtype))
            found[name] = padded([own if t is None else t.head.get(name, own) for t in tenants])
        return found

    def _poolings(self, tenants: Sequence[Tenant | None]) -> dict[str, Tensor]:
        rows: dict[str, list[int]] = {}
        for place, tenant in enumerate(tenants):
            if tenant is not None and tenant.pooling is not None:
                rows.setdefault(tenant.pooling, []).append(place)
        return {pooling: torch.tensor(places, device=self.device) for pooling, places in rows.items()}

    def _prove(self, delta: Delta, tenant: Tenant) -> None:
        """Compare a row of a mixed batch with what its delta gives alone, and one of the base beside it with the base.

        Raises:
            DeltaError: what it gives alone is not finite.
            AttachError: they differ, or the batch cannot be computed.
        """
        if self._sample is None:
            self._sample = fitting_inputs(self.plain)
        sample = {name: value.to(self.device) for name, value in self._sample.items()}
        count, head = len(next(iter(sample.values()))), self._own_head(delta)
        ours = replace(tenant, head={name: value.to(self.device) for name, value in head.items()})
        rows = [ours] * count if tenant.prompt else [None, *[ours] * (count - 1)]
        with torch.inference_mode():
            base = _outputs(self.plain(**sample))
            with attached(self.plain, replace(delta, tensors={**delta.tensors, **head})):
                alone = _outputs(self.plain(**sample))
            with mixed(self.mix(rows)):
                found = _outputs(self.model(**sample))
        if not all(bool(torch.isfinite(output).all()) for output in alone):
            raise DeltaError("the model's outputs with the delta are not finite (NaN): its values are damaged")
        for place, row in enumerate(rows):
            apart, size = _apart(found, base if row is None else alone, place)
            if not apart <= self._tolerance * max(size, 1.0):
                what = "the untouched base" if row is None else str(delta.recipe)
                raise AttachError(
                    f"rows of one batch cannot have different results of {delta.recipe} on "
                    f"{type(self.plain).__name__}: a row of {what} is {apart:.1e} off from what it is alone"
                )

    @property
    def _tolerance(self) -> float:
        return LOW_TOLERANCE if next(self.plain.parameters()).dtype in LOW else TOLERANCE

    def _own_head(self, delta: Delta) -> dict[str, Tensor]:
        """The model's own head under the names of a delta's, whose shapes may be others."""
        return {name: self.plain.get_parameter(name).detach().cpu().to(delta.tensors[name]) for name in delta.head}

    def close(self) -> None:
        """Take everything off the second model."""
        with self.lock:
            self.mixture.close()


def _signature(delta: Delta) -> Signature:
    """What deltas have in common that differ in values only."""
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(delta.tensors.items()))
    return (str(delta.recipe), delta.pooling, delta.head, shapes)


def _few(delta: Delta, layout: RowLayout) -> tuple[Tensor, Tensor | None]:
    """Values and places of a delta that trained a part; all values if a file holds drawn starts as well."""
    if any(name.endswith(START) for name in delta.tensors):
        row = layout.base.clone().cpu()
        for name, (offset, shape) in layout.places.items():
            part = row[offset : offset + prod(shape)]
            if (start := delta.tensors.get(name + START)) is not None:
                part.copy_(start.flatten())
            if name in delta.tensors:
                part[delta.tensors[name + INDICES].long()] = delta.tensors[name]
        return row, None
    values, places = [], []
    for name, (offset, _) in layout.places.items():
        if name in delta.tensors:
            values.append(delta.tensors[name].flatten())
            index = delta.tensors.get(name + INDICES)
            places.append(offset + (torch.arange(len(values[-1])) if index is None else index.long()))
    return torch.cat(values), torch.cat(places)


def _outputs(outputs: Any) -> list[Tensor]:
    """A model's outputs as tensors."""
    values = outputs.values() if hasattr(outputs, "values") else outputs
    return [value.float() for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _apart(found: Sequence[Tensor], wanted: Sequence[Tensor], row: int) -> tuple[float, float]:
    """Largest difference of one row, and the largest size there."""
    pairs = [(one[row], other[row]) for one, other in zip(found, wanted, strict=True) if one.ndim]
    return (
        max(float((one - other).abs().max()) for one, other in pairs),
        max(float(other.abs().max()) for _, other in pairs),
    )
