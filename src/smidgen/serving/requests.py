"""What waits to be computed."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from smidgen.data.encoded import Example
from smidgen.data.kinds.base import TaskKind
from smidgen.serving.served_model import ServedModel
from smidgen.serving.tenants import Tenant

Wanted = Literal["logits", "vector"]
Result = tuple[Tensor, Tensor | None]  # of one row: logits and labels, or a vector


@dataclass(eq=False)
class Request:
    """One example, for one delta.

    Attributes:
        model: whose rows it is one of.
        tenant: None for the untouched base.
        wanted: what of the model's outputs is the result.
        width: outputs of the tenant's head; None for all that there are.
        length: of the example, by which those of a batch are put together.
        future: of the result, on the CPU.
        arrived: seconds of a clock that only goes forward.
    """

    model: ServedModel
    tenant: Tenant | None
    kind: TaskKind
    example: Example
    wanted: Wanted
    width: int | None
    length: int
    future: Future[Result] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)

    @property
    def group(self) -> tuple[object, ...]:
        """Requests of one group can be computed together."""
        prompt = 0 if self.tenant is None else self.tenant.prompt
        return (id(self.model), self.kind.name, self.wanted, prompt, tuple(sorted(self.example)))
