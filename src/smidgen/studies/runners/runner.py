"""Runner: where the trials of a search, or the runs of a study, are made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from smidgen.delta.delta import Delta
from smidgen.studies.runners.work import Todo, Work
from smidgen.studies.trial import Trial

Batches = Iterable[tuple[Work, Todo]]


class Runner(Protocol):
    """Makes trials; nobody else knows whether in this process, in others, or on other machines."""

    def trials(self, batches: Batches) -> Iterator[tuple[Trial, Delta | None]]:
        """Trials in order, each with its delta or None if it came to none.

        A trial with a folder has its run in there, whole, when it is given. One whose folder holds a finished run is
        read, not made again.

        Args:
            batches: trials that have their work in common; asked for one by one.

        Raises:
            TrainError: what `fit` raises; or the work cannot be sent, or a process was killed.
        """
        ...
