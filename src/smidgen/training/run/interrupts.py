"""Ctrl-C and SIGTERM: a run stops between two steps, saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Self


class Interrupts:
    """Ctrl-C waits for the end of the step, where the state is whole; a second one does not wait."""

    def __enter__(self) -> Self:
        self.seen, self.before = False, signal.getsignal(signal.SIGINT)
        self.placed = threading.current_thread() is threading.main_thread() and callable(self.before)
        if self.placed:
            signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *error: object) -> None:
        if self.placed:
            signal.signal(signal.SIGINT, self.before)
