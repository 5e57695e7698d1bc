"""What hooks of torch's signature get and give: of every model's own types, so that nothing is known of the values."""

from __future__ import annotations

from typing import Any, TypeAlias, cast

from torch import Tensor

Args: TypeAlias = tuple[Any, ...]  # positional arguments of a forward
Kwargs: TypeAlias = dict[str, Any]  # its arguments by name


def first_of(output: object) -> tuple[Tensor, tuple[object, ...]]:
    """Of what a module gives, the tensor that goes on, and what stands behind it in a tuple."""
    first, *rest = output if isinstance(output, tuple) else (output,)
    return cast(Tensor, first), tuple(rest)


def like(output: object, first: Tensor, rest: tuple[object, ...]) -> object:
    """Tensor and rest again, in the form of what was given."""
    if not isinstance(output, tuple):
        return first
    named: Any = type(output)
    return named(first, *rest) if hasattr(named, "_fields") else (first, *rest)
