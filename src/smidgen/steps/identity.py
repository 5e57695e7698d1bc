"""What tells one objective from another in a record: its class and its fields, the same in every process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass

from torch import nn

from smidgen.common.errors import TrainError
from smidgen.data.task import Task
from smidgen.delta.content_hash import content_digest
from smidgen.delta.delta import Delta
from smidgen.recipe.recipe import Recipe, Term


def identity_of(thing: object) -> str:
    """`Class(field=value, ...)` of an object whose fields are plain data, deltas, tasks, modules or such objects.

    Raises:
        TrainError: a field holds something else, or there are attributes that are no fields.
    """
    cls = type(thing)
    named = [f for f in fields(thing) if f.repr] if is_dataclass(thing) else []
    known = {f.name for f in fields(thing)} if is_dataclass(thing) else set()
    others = sorted(set(getattr(thing, "__dict__", {})) - known)
    if others:
        raise TrainError(
            f"{cls.__name__} keeps {', '.join(others)} beside its fields, so that a record cannot tell it apart; make "
            "it a frozen dataclass with these as fields"
        )
    said = (f"{f.name}={_spelled(getattr(thing, f.name), f'{cls.__name__}.{f.name}')}" for f in named)
    return f"{cls.__qualname__}({', '.join(said)})"


def _spelled(value: object, where: str) -> str:
    """A value in words that are the same in every process."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    if isinstance(value, Delta):
        return f"Delta({value.digest})"
    if isinstance(value, Task):
        return f"Task({value.name!r}, {value.fingerprint})"
    if isinstance(value, nn.Module):
        return f"{type(value).__qualname__}({content_digest(value)})"
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    if isinstance(value, Recipe | Term):
        return repr(str(value))
    if isinstance(value, list | tuple):
        inside = ", ".join(_spelled(each, where) for each in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(_items(value, where))}}}"
    if is_dataclass(value) and not isinstance(value, type):
        return identity_of(value)
    raise TrainError(
        f"{where} holds {value!r:.60}, which no record can tell apart in another process; give it numbers, strings, "
        "deltas or tasks, or leave it out of what counts (field(repr=False))"
    )


def _items(value: Mapping[object, object], where: str) -> Iterator[str]:
    for key, each in value.items():
        yield f"{_spelled(key, where)}: {_spelled(each, where)}"
