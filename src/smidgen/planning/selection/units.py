"""Units: which values of a plan's tensors stand or fall together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from smidgen.common.errors import PlanError
from smidgen.planning.entry import Entry, Shape
from smidgen.sites.discovery import find_sites
from smidgen.sites.fused_rows import Rows
from smidgen.sites.site import MapSite, Site


@dataclass(frozen=True)
class Candidate:
    """One tensor that a selection may keep parts of."""

    entry: Entry
    term: str
    shape: Shape

    @property
    def name(self) -> str:
        """Its saved name."""
        return self.entry.name(self.term)

    @property
    def size(self) -> int:
        """Number of its values."""
        return prod(self.shape)


def candidates(entries: Sequence[Entry]) -> list[Candidate]:
    """All tensors of these entries, in the plan's order."""
    return [Candidate(entry, term, shape) for entry in entries for term, shape in entry.terms]


def label_units(model: nn.Module, found: Sequence[Candidate], granularity: str) -> tuple[Tensor, int]:
    """Unit of each value of all candidates laid end to end, -1 for none, and the number of units.

    Raises:
        PlanError: heads are wanted of tensors that have none, or the model does not say how many there are.
    """
    if granularity == "element":
        total = sum(c.size for c in found)
        return torch.arange(total), total
    if granularity == "head":
        return _heads(model, found)
    keys = [c.name if granularity == "tensor" else layer_key(c.entry.site) for c in found]
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    parts = [torch.full((c.size,), numbers[key]) for c, key in zip(found, keys, strict=True)]
    return torch.cat(parts), len(numbers)


def layer_key(site: Site) -> str:
    """The layer of a site; what lies outside the layers is a unit of its own."""
    return site.path if site.layer is None else f"{site.stack}.{site.layer}"


def check_heads(model: nn.Module, found: Sequence[Candidate]) -> None:
    """Raises PlanError unless some of the candidates are heads' own, and the model says how many heads it has."""
    head_count(model)
    slices = [site for site in find_sites(model) if isinstance(site, MapSite) and site.rows is not None]
    if not any(_parts(c, slices) for c in found):
        raise PlanError(
            "granularity='head' needs tensors of query, key, value or attention output, such as those of BitFit() or "
            "LoRA(); the recipe has none (norms belong to no head)"
        )


def _heads(model: nn.Module, found: Sequence[Candidate]) -> tuple[Tensor, int]:
    """The attention head of every value of the candidates, (N,) int64 with -1 for none, and the number of heads."""
    check_heads(model, found)
    out = all("attention_out" in c.entry.site.roles for c in found)
    count = head_count(model, OWN if out else GROUPED)
    slices = [site for site in find_sites(model) if isinstance(site, MapSite) and site.rows is not None]
    numbers: dict[str, int] = {}
    parts = []
    for c in found:
        key = layer_key(c.entry.site)
        local = torch.full(c.shape, -1)
        for dim, rows in _parts(c, slices):
            _number(local, dim, rows, count)
        if (local >= 0).any():
            local[local >= 0] += numbers.setdefault(key, len(numbers) * count)
        parts.append(local.flatten())
    return torch.cat(parts), len(numbers) * count


OWN, GROUPED = ("num_attention_heads",), ("num_key_value_heads", "num_attention_heads")


def head_count(model: nn.Module, fields: Sequence[str] = GROUPED) -> int:
    """Heads of a layer's attention; of grouped queries the key / value heads, each with its group, unless `OWN`."""
    config: PreTrainedConfig | None = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    for name in fields:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    raise PlanError(f"granularity='head': {type(model).__name__} does not say how many heads it has")


def _parts(c: Candidate, slices: Sequence[MapSite]) -> list[tuple[int, Rows]]:
    """Dimension and places of a tensor that hold one projection's outputs, or the output map's inputs."""
    site, shape = c.entry.site, c.shape
    if not isinstance(site, MapSite):
        return []
    fused = [s for s in slices if s.path == site.path] if site.rows is None and not c.entry.added else []
    if fused:
        dim = len(shape) - 1 if site.transposed else 0
        return [(dim, s.rows) for s in fused if s.rows and s.roles & {"query", "key", "value"}]
    enters = c.entry.added and len(shape) == 1 and c.entry.method.enters(site)  # a vector of the input's width
    if site.roles & {"query", "key", "value"} and not enters:
        dim = len(shape) - 1 if site.transposed and not c.entry.added else 0
        return [(dim, Rows(0, shape[dim]))] if shape[dim] == site.width_out else []
    if "attention_out" in site.roles and c.entry.added and shape == (site.width_in,):
        return [(0, Rows(0, site.width_in))] if enters else []
    if "attention_out" in site.roles and len(shape) == 2:
        dim = 0 if site.transposed and not c.entry.added else 1
        return [(dim, Rows(0, shape[dim]))] if shape[dim] == site.width_in else []
    return []


def _number(local: Tensor, dim: int, rows: Rows, count: int) -> None:
    """Write head 0 ... count - 1 over equal runs of these places along the dimension."""
    if rows.length % count:
        raise PlanError(f"granularity='head': {rows.length} rows do not divide into {count} heads")
    shape = [1] * local.ndim
    shape[dim] = rows.length
    heads = torch.arange(count).repeat_interleave(rows.length // count).view(shape)
    places = rows.numbers(local.shape[dim])
    local.index_copy_(dim, places, heads.expand(*local.shape[:dim], rows.length, *local.shape[dim + 1 :]))
