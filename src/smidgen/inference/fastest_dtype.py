"""Which dtype a base computes fastest in: measured here and now, not looked up."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS, WIDTH, REPEATS = 512, 1024, 7
WORTH = 1.2  # bfloat16 keeps 8 bits of a number: for less gain it is not taken


@dataclass(frozen=True)
class Precision:
    """The dtype that was chosen, and why.

    Attributes:
        dtype: torch.bfloat16 where its matrix products are faster by `WORTH` or more, else torch.float32.
        gain: time of a float32 product over that of a bfloat16 one; 0 if the device has none.
    """

    dtype: torch.dtype
    gain: float

    def __str__(self) -> str:
        if not self.gain:
            return "float32: this device has no bfloat16"
        return f"{str(self.dtype)[6:]}: a bfloat16 matrix product takes 1/{self.gain:.2f} of the time of a float32 one"


def fastest(device: str | torch.device = "cpu") -> Precision:
    """Time products of (512, 1024) and (1024, 1024) in both dtypes, in turns, and compare the medians."""
    try:
        pairs = {dtype: _pair(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
        for pair in pairs.values():
            _seconds(pair)
    except (RuntimeError, NotImplementedError):
        return Precision(torch.float32, 0.0)
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in pairs}
    for _ in range(REPEATS):
        for dtype, pair in pairs.items():
            times[dtype].append(_seconds(pair))
    gain = statistics.median(times[torch.float32]) / statistics.median(times[torch.bfloat16])
    return Precision(torch.bfloat16 if gain >= WORTH else torch.float32, gain)


def _pair(dtype: torch.dtype, device: str | torch.device) -> tuple[Tensor, Tensor]:
    return torch.ones(ROWS, WIDTH, dtype=dtype, device=device), torch.ones(WIDTH, WIDTH, dtype=dtype, device=device)


def _seconds(pair: tuple[Tensor, Tensor]) -> float:
    left, right = pair
    _wait(left)
    start = time.perf_counter()
    torch.nn.functional.linear(left, right)
    _wait(left)
    return time.perf_counter() - start


def _wait(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
