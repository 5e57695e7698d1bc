"""Models, tasks and objectives as bytes, for another process or another machine."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import cloudpickle
import torch
from datasets.table import InMemoryTable, MemoryMappedTable

from smidgen.common.errors import TrainError


@contextmanager
def sending(how: str, instead: str) -> Iterator[None]:
    """Whatever a model, a processor or an objective raises when it is pickled, in one line."""
    try:
        yield
    except Exception as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise TrainError(f"{how} sends model, task and objective to other processes: {said}; {instead}") from error


class _ByValue(cloudpickle.Pickler):  # type: ignore[misc]
    """Rows that lie in a file of this machine are written out; datasets itself would write the file's path."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, MemoryMappedTable):
            return InMemoryTable, (obj.table,)
        return super().reducer_override(obj)


def packed(value: object) -> bytes:
    """The bytes of a value, such that another machine can read them without this one's disk."""
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_module=SimpleNamespace(__name__="smidgen", Pickler=_ByValue))
    return buffer.getvalue()


def unpacked(content: bytes) -> Any:
    """The inverse of `packed`, in this machine's memory."""
    # Whole objects, so no weights_only: the bytes come from the process that asks for the trials.
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
