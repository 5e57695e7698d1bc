"""Which layers a spec such as "top:2" means."""

from __future__ import annotations

from collections.abc import Sequence

_EXAMPLES = "use a number, several such as (0, 5), 'top:2', 'bottom:3' or a slice such as '2:5'"


def layer_indices(spec: str | int | Sequence[int] | None, depth: int) -> set[int] | None:
    """Which layers of a stack of `depth` blocks a spec means; None means all and stays None.

    A spec is a number, several numbers, "top:2", "bottom:3" or a Python slice such as "2:5"; negative numbers
    count from the end.

    Raises:
        ValueError: the spec cannot be read, means no layer, or reaches outside the stack.
    """
    if spec is None:
        return None
    try:
        numbers = _numbers(spec, depth)
    except (TypeError, ValueError):
        raise ValueError(f"layers={spec!r} cannot be read; {_EXAMPLES}") from None
    if any(not -depth <= number < depth for number in numbers):
        raise ValueError(f"layers={spec!r} but the stack has {depth} layers, 0 to {depth - 1}")
    if not numbers:
        raise ValueError(f"layers={spec!r} means no layer at all; {_EXAMPLES}")
    return {number % depth for number in numbers}


def _numbers(spec: str | int | Sequence[int], depth: int) -> list[int]:
    """The layers meant, not yet checked: what lies outside the stack is kept for the caller to refuse."""
    if not isinstance(spec, str):
        several = [spec] if isinstance(spec, int) else list(spec)
        if not all(type(n) is int for n in several):
            raise TypeError
        return several
    first, *rest = spec.split(":")
    if not rest:
        return [int(first)]
    (last,) = rest
    if first in ("top", "bottom"):
        return list(range(-int(last), 0) if first == "top" else range(int(last)))
    start, stop = int(first.strip() or 0), int(last.strip() or depth)
    return list(range(*(n + depth if -depth <= n < 0 else n for n in (start, stop))))
