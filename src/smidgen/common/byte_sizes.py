"""Sizes in bytes as people write and read them: "4GB", "512MiB"; "91.2 MB"."""

from __future__ import annotations

from smidgen.common.errors import TrainError


def parse_bytes(text: str | int) -> int:
    """Bytes of a size: `"4GB"` is 4 * 10**9, `"512MiB"` is 512 * 2**20; a whole number is bytes.

    Raises:
        TrainError: it is no size, or not above 0.
    """
    from accelerate.utils import convert_file_size_to_int  # loads torch, which the command line's help does without

    try:
        plain = isinstance(text, int) or text.strip().isdecimal()
        found: int = int(text) if plain else convert_file_size_to_int(str(text).strip().upper())
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise TrainError(f"{text!r} is no size of memory; write it like 4GB or 512MiB (KB, MB, GB, KiB, MiB, GiB)")
    return found


def format_bytes(count: float) -> str:
    """A number of bytes: `55,432 bytes`, `91.2 MB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count:,.0f} bytes"
