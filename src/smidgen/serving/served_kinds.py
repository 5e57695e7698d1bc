"""Which kinds of task are served: those whose answers are made of rows of outputs, and texts of causal LMs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from smidgen.data.kinds.base import TaskKind
from smidgen.serving.errors import ServingError

# Classes of kinds that compute answers by calls of the model itself, which knows of no delta here.
UNSERVED = frozenset(["AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"])


def check_served(kind: TaskKind) -> None:
    """Raises ServingError if a kind of task is not served."""
    if kind.model_class in UNSERVED:
        _refuse(kind)


def _refuse(kind: TaskKind) -> NoReturn:
    raise ServingError(
        f"{kind.name} tasks are not served: their answers are no rows of one pass, which deltas could share; "
        "use smidgen.predict"
    )


@dataclass(frozen=True)
class NoModel:
    """Stands in a question for the model, which would answer without the delta. Any use of it raises ServingError."""

    kind: TaskKind

    def __getattr__(self, name: str) -> NoReturn:
        """Of any name."""
        _refuse(self.kind)

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """A forward pass."""
        _refuse(self.kind)
