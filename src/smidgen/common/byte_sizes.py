"""Sizes in bytes as people write them: "4GB", "512MiB"."""

from __future__ import annotations

from accelerate.utils import convert_file_size_to_int

from smidgen.common.errors import TrainError


def parse_bytes(text: str | int) -> int:
    """Bytes of a size: `"4GB"` is 4 * 10**9, `"512MiB"` is 512 * 2**20; a whole number is bytes.

    Raises:
        TrainError: it is no size, or not above 0.
    """
    try:
        plain = isinstance(text, int) or text.strip().isdecimal()
        found: int = int(text) if plain else convert_file_size_to_int(str(text).strip().upper())
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise TrainError(f"{text!r} is no size of memory; write it like 4GB or 512MiB (KB, MB, GB, KiB, MiB, GiB)")
    return found
