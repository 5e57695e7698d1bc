"""What delta.json says: everything of a delta but its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


class TensorForm(TypedDict):
    """What is said of a tensor: its dtype as torch names it, and its shape."""

    dtype: str
    shape: Sequence[int]


class DeltaForm(TypedDict):
    """The fields of delta.json, no more and no less."""

    format_version: int
    smidgen_version: str
    recipe: list[dict[str, object]]
    base: dict[str, str]
    head: list[str]
    pooling: str | None
    labels: list[str]
    info: Mapping[str, Any]
    tensors: Mapping[str, TensorForm]


FIELDS = frozenset(DeltaForm.__annotations__)
