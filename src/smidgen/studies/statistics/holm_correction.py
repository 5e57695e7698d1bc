"""Holm's step-down correction (Holm 1979): p-values of several arms, each against the same reference."""

from __future__ import annotations

from collections.abc import Mapping

from smidgen.common.errors import StudyError


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Adjusted p-values, which keep the chance of any false alarm at the level that each is compared with.

    p_(i) -> max over j <= i of min(1, (m - j + 1) p_(j)), sorted from the smallest; None stays None and counts as no
    test.

    Raises:
        StudyError: one is no probability.
    """
    odd = next((name for name, p in p_values.items() if p is not None and not 0 <= p <= 1), None)
    if odd is not None:
        raise StudyError(f"the p-value of {odd!r} must lie in 0..1, found {p_values[odd]}")
    given = sorted((p, name) for name, p in p_values.items() if p is not None)
    found: dict[str, float | None] = dict.fromkeys(p_values)
    highest = 0.0
    for i, (p, name) in enumerate(given):
        highest = max(highest, min(1.0, (len(given) - i) * p))
        found[name] = highest
    return found
