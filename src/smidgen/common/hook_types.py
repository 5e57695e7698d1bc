"""What hooks of torch's signature get and give: of every model's own types, so that nothing is known of the values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

from torch import Tensor
from transformers.utils.generic import ModelOutput

Args: TypeAlias = tuple[Any, ...]  # positional arguments of a forward
Kwargs: TypeAlias = dict[str, Any]  # its arguments by name
Output: TypeAlias = tuple[Tensor, ...] | ModelOutput  # what a model of transformers gives


def first_of(output: object) -> tuple[Tensor, tuple[object, ...]]:
    """Of what a module gives, the tensor that goes on, and what stands behind it in a tuple."""
    first, *rest = output if isinstance(output, tuple) else (output,)
    return cast(Tensor, first), tuple(rest)


def like(output: object, first: Tensor, rest: tuple[object, ...]) -> object:
    """Tensor and rest again, in the form of what was given."""
    if not isinstance(output, tuple):
        return first
    make: Callable[..., object] = type(output)
    return make(first, *rest) if hasattr(make, "_fields") else (first, *rest)
