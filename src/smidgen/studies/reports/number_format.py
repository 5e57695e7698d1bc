"""Numbers as people and JSON have them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


def power(values: Iterable[float | None]) -> int:
    """The power of ten to take out of a column so that its largest number reads well; 0 for whole numbers."""
    given = [v for v in values if v is not None and math.isfinite(v)]
    sizes = [abs(v) for v in given if v]
    if not sizes or 0.01 <= max(sizes) < 1e5 or all(isinstance(v, int) for v in given):
        return 0
    return math.floor(math.log10(max(sizes)))


@dataclass(frozen=True)
class Format:
    """How the numbers of one column are written.

    Attributes:
        scale: the power of ten that is taken out of all of them.
        places: after the point, the same for all; None where they span so much that each has its own power of ten.
        unit: what stands at the head of the column: "×10⁻⁴", "%" or nothing.
    """

    scale: int
    places: int | None
    unit: str

    @classmethod
    def of(cls, values: Iterable[float | None], percent: bool = False, digits: int = 3) -> Format:
        """Three digits for the largest number, one more if the others are much smaller; whole numbers stay whole."""
        given = [v for v in values if v is not None and math.isfinite(v)]
        sizes, whole = [abs(v) for v in given if v], all(isinstance(v, int) for v in given)
        scale = -2 if percent else power(given)
        unit = "%" if percent else times(scale)
        if not sizes or whole:
            return cls(scale, 0, unit)
        span = max(sizes) / min(sizes)
        if span >= 2000 and not percent:
            return cls(0, None, "")
        places = digits - 1 + (span > 20) - math.floor(math.log10(max(sizes)) - scale)
        return cls(scale, min(4, max(0, places)), unit)

    def show(self, value: float | None) -> str:
        """The number as text, without the unit; an en dash for a missing one."""
        if value is None or not math.isfinite(value):
            return "–"
        if self.places is None:
            return brief(value)
        return f"{value / 10.0**self.scale:,.{self.places}f}".replace("-", "−")


def brief(value: float) -> str:
    """A number alone, three digits: `0.0312`, `3.10×10⁻⁵`, `12,480`."""
    own = Format.of([value])
    return f"{own.show(value)}{own.unit}"


def superscript(number: int) -> str:
    """A whole number in raised figures, for units such as ×10⁻⁴."""
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def times(scale: int) -> str:
    """The unit that belongs to a power taken out of a column: "×10⁻⁴", or nothing."""
    return f"×10{superscript(scale)}" if scale else ""
