"""Engine: one thread that computes what is waiting, in batches of like length, and goes on with texts in between."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from smidgen.serving.decoding import Decoding, Generation
from smidgen.serving.errors import ClosedError, QueueFullError, ServingError
from smidgen.serving.forward_batches import compute
from smidgen.serving.requests import Request


@dataclass(frozen=True)
class Limits:
    """How requests are put together.

    Attributes:
        batch: most rows of one pass.
        wait: seconds that a request waits for others to share its pass.
        queue: most requests waiting.
        texts: most texts that are written at a time.
    """

    batch: int = 32
    wait: float = 0.004
    queue: int = 4096
    texts: int = 32

    def __post_init__(self) -> None:
        for name in ("batch", "queue", "texts"):
            if getattr(self, name) < 1:
                raise ServingError(f"{name}={getattr(self, name)}: at least 1 is needed")
        if self.wait < 0:
            raise ServingError(f"wait={self.wait}: seconds, not below 0")


@dataclass
class Counts:
    """What an engine has done; `seconds` are those of its passes and steps."""

    passes: int = 0
    rows: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Engine:
    """Takes requests from any number of threads; `close` answers what it has taken.

    A pass takes the group of the request that waited longest, and of that group the ones of most similar length.
    Between two passes each text that is being written grows by a token.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits, self.counts = limits or Limits(), Counts()
        self._waiting: list[Request] = []
        self._texts: list[Generation] = []
        self._decoding: dict[tuple[int, int], Decoding] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="smidgen-engine", daemon=True)
        self._thread.start()

    @property
    def closing(self) -> bool:
        """Whether no more requests are taken."""
        return self._closing

    @property
    def writing(self) -> int:
        """Texts that are being written."""
        return sum(len(decoding) for decoding in list(self._decoding.values()))

    @property
    def waiting(self) -> int:
        """Requests that no pass has taken yet."""
        return len(self._waiting) + len(self._texts)

    def submit(self, requests: Sequence[Request]) -> None:
        """Let requests be computed: all of them, or none.

        Raises:
            QueueFullError: too many are waiting.
            ClosedError: the engine is closing.
        """
        with self._changed:
            self._check(len(requests))
            self._waiting.extend(requests)
            self._changed.notify()

    def write(self, text: Generation) -> None:
        """Let a text be written. Raises as `submit` does."""
        with self._changed:
            self._check(1)
            self._texts.append(text)
            self._changed.notify()

    def _check(self, count: int) -> None:
        if self._closing:
            raise ClosedError("the server is stopping and takes no more requests")
        if self.waiting + count > self.limits.queue:
            raise QueueFullError(f"{self.waiting} requests are waiting, and at most {self.limits.queue} may; try later")

    def close(self) -> None:
        """Take nothing more, answer what has been taken, and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        """The thread: a token for each text, then a batch, until nothing is left of what was taken before closing."""
        while True:
            with self._changed:
                while not (self._waiting or self._texts or self._decoding):
                    if self._closing:
                        return
                    self._changed.wait()
            self._join_texts()
            self._step_texts()
            batch = self._next_batch()
            if batch:
                self._pass(batch)

    def _next_batch(self) -> list[Request]:
        """The next requests to compute; waits a little for more of them, unless texts are being written."""
        with self._changed:
            while self._waiting:
                oldest = self._waiting[0]
                group = [request for request in self._waiting if request.group == oldest.group]
                left = oldest.arrived + self.limits.wait - time.monotonic()
                if len(group) < self.limits.batch and left > 0 and not (self._closing or self._decoding):
                    self._changed.wait(left)
                    continue
                taken = like_length(group, self.limits.batch)
                chosen = set(map(id, taken))
                self._waiting = [request for request in self._waiting if id(request) not in chosen]
                return taken
        return []

    def _pass(self, batch: Sequence[Request]) -> None:
        """Compute a batch and answer it; those who wait no more are left out."""
        live = [request for request in batch if request.future.set_running_or_notify_cancel()]
        if not live:
            return
        self.counts.passes += 1
        self.counts.rows += len(live)
        try:
            with self._timed():
                results = compute(live)
        except Exception as error:  # told to whoever asked; the thread goes on
            self._alone_or_failed(live, error)
            return
        for request, result in zip(live, results, strict=True):
            request.future.set_result(result)

    def _alone_or_failed(self, batch: Sequence[Request], error: Exception) -> None:
        """One bad row does not spoil the others' answers: each is tried by itself."""
        if len(batch) == 1:
            batch[0].future.set_exception(error)
            return
        for request in batch:
            try:
                (result,) = compute([request])
            except Exception as own:  # as above
                request.future.set_exception(own)
            else:
                request.future.set_result(result)

    def _join_texts(self) -> None:
        """Let new texts join those that are being written."""
        with self._changed:
            count = max(self.limits.texts - self.writing, 0)
            new, self._texts = self._texts[:count], self._texts[count:]
        groups: dict[tuple[int, int], list[Generation]] = {}
        for text in new:
            if text.future.set_running_or_notify_cancel():
                groups.setdefault(text.group, []).append(text)
        for key, texts in groups.items():
            decoding = self._decoding.setdefault(key, Decoding(texts[0].model))
            with self._timed():
                decoding.join(texts)

    def _step_texts(self) -> None:
        """A token for each text; groups in which all are finished go."""
        for key, decoding in list(self._decoding.items()):
            if len(decoding):
                self.counts.steps += 1
                self.counts.tokens += len(decoding)
                with self._timed():
                    decoding.step()
            if not len(decoding):
                del self._decoding[key]

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.counts.seconds += time.perf_counter() - begin


def like_length(group: Sequence[Request], count: int) -> list[Request]:
    """The first request and those of a group that are nearest to it in length, at most so many."""
    first, *others = group
    nearest = sorted(others, key=lambda request: abs(request.length - first.length))
    return [first, *nearest[: count - 1]]
