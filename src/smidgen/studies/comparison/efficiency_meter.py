"""What a run takes of the machine: EfficientLLM's measures (arXiv:2505.13840), as far as this machine tells them.

    average memory       AMU = (1/T) integral of memory(t) dt      bytes, of the process, by the trapezoidal rule
    compute utilisation  PCU = CPU time / (T * threads)             1 where every thread is busy all the time
    latency              AL  = T / steps                            seconds a step

Average power (AEC) needs a meter of the machine's, and is not measured: None, never 0.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from types import TracebackType
from typing import Self

import psutil
import torch

EVERY = 0.1  # seconds between two samples of memory


class EfficiencyMeter:
    """Measures what happens inside a `with`.

    Attributes:
        seconds: that it took.
        average_memory_bytes, peak_memory_bytes: resident memory of the process.
        cpu_utilisation: share of the threads' time, 0 to 1.
    """

    def __init__(self, every: float = EVERY) -> None:
        self.every = every
        self.seconds = self.average_memory_bytes = self.peak_memory_bytes = self.cpu_utilisation = 0.0
        self._process, self._samples = psutil.Process(), list[tuple[float, float]]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._begun, self._cpu = time.perf_counter(), time.process_time()
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
        self.seconds = time.perf_counter() - self._begun
        threads = max(1, torch.get_num_threads())
        self.cpu_utilisation = (time.process_time() - self._cpu) / (self.seconds * threads)
        self.average_memory_bytes = time_average(self._samples)
        self.peak_memory_bytes = max(value for _, value in self._samples)

    def to_json(self) -> dict[str, float | None]:
        """Plain data; None for what is not measured."""
        return {
            "seconds": self.seconds,
            "average_memory_bytes": self.average_memory_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "cpu_utilisation": self.cpu_utilisation,
            "average_power_watts": None,
        }

    def _sample(self) -> None:
        self._samples.append((time.perf_counter(), float(self._process.memory_info().rss)))

    def _watch(self) -> None:
        while not self._stop.wait(self.every):
            self._sample()


def time_average(samples: Sequence[tuple[float, float]]) -> float:
    """Mean of (time, value) over time by the trapezoidal rule, however uneven the times; of one sample its value."""
    area = sum((t1 - t0) * (v0 + v1) / 2 for (t0, v0), (t1, v1) in pairwise(samples))
    span = samples[-1][0] - samples[0][0]
    return area / span if span > 0 else samples[-1][1]
