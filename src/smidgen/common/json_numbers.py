"""Numbers that JSON can hold, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping


def plain(data: Mapping[str, object]) -> dict[str, object]:
    """The data as JSON has it: numbers that are not finite become null."""
    return {str(key): _plain(entry) for key, entry in data.items()}


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return plain(value)
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def restored(value: float | None) -> float:
    """The inverse of `plain` for one number: null becomes nan."""
    return math.nan if value is None else float(value)
