"""Memory of the process: given back early, and running out of it said in one line."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from smidgen.common.errors import TrainError

MMAP_THRESHOLD, BYTES = -3, 1 << 17  # mallopt's number, and glibc's own value before it grows it


def give_back_memory() -> bool:
    """Let glibc give freed tensors back at once, so that a process takes what the estimate says; False elsewhere.

    By default its threshold grows with what is freed, and large tensors then stay in its heap, in pieces.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, BYTES))
    except (AttributeError, OSError, TypeError):
        return False


@contextmanager
def memory_guard(batch_size: int, batch_tokens: int | None = None) -> Iterator[None]:
    """Turn an out-of-memory error into one line that suggests a smaller batch, in rows or in tokens."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error).lower()
        if not isinstance(error, MemoryError) and "out of memory" not in text and "can't allocate memory" not in text:
            raise
        name, size = ("batch_size", batch_size) if batch_tokens is None else ("batch_tokens", batch_tokens)
        unit = "" if batch_tokens is None else " tokens"
        raise TrainError(f"a batch of {size}{unit} does not fit into memory; try {name}={max(1, size // 2)}") from error
