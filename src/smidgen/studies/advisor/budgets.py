"""A budget of time as a person writes it."""

from __future__ import annotations

import re

import pandas as pd

from smidgen.common.errors import StudyError

LONE = re.compile(r"\s*[\d.]+\s*")


def seconds_of(text: str) -> float:
    """Seconds of "20min", "90s", "1h30m". Raises StudyError if it is none, or not above 0."""
    try:
        if LONE.fullmatch(text):  # which pandas takes for nanoseconds
            raise ValueError
        found = float(pd.Timedelta(text).total_seconds())
    except ValueError:
        raise StudyError(f"budget {text!r} is no time; write 90s, 20min or 1h30m") from None
    if not found > 0:
        raise StudyError(f"budget {text!r} must be above 0")
    return found
