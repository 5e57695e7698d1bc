"""Head only."""

from __future__ import annotations

from dataclasses import dataclass

from smidgen.methods.base import Method


@dataclass(frozen=True)
class Head(Method):
    """Train the task's head and nothing else: the honest baseline, a probe.

    Alain and Bengio 2016, Understanding intermediate layers using linear classifier probes, arXiv:1610.01644,
    section 3.

        logits = head(h),  h frozen

    Shapes:
        none: the head belongs to every recipe and is counted apart

    Departures: the head is the model class's own (a single linear layer, or dense + tanh + linear), not always linear.
    """
