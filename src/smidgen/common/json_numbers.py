"""Numbers that JSON can hold, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import overload


@overload
def plain(value: Mapping[str, object]) -> dict[str, object]: ...


@overload
def plain(value: object) -> object: ...


def plain(value: object) -> object:
    """The value as JSON has it: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def restored(value: float | None) -> float:
    """The inverse of `plain` for one number: null becomes nan."""
    return math.nan if value is None else float(value)
