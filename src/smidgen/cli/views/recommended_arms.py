"""What a recommendation looks like in a terminal."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from smidgen.cli.views import comparisons

if TYPE_CHECKING:
    from smidgen.studies.advisor.recommendations import Recommendation
    from smidgen.studies.advisor.rungs import Rung


def rates_in(rung: Rung) -> int:
    """How many rates each arm of a rung tries."""
    return max((len(rates) for rates in rung.arms.values() if rates), default=1)


def runs_of(rung: Rung) -> int:
    """How many runs a rung takes."""
    return len(rung.arms) * (rates_in(rung) + rung.seeds - 1)


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}" + ("s" if number > 1 else "")


def rung_line(rung: Rung) -> str:
    """A rung in a line."""
    seeds = f", {rung.seeds} seeds" if rung.seeds > 1 else ""
    size = "all examples" if rung.examples is None else _count(rung.examples, "example")
    return f"{_count(len(rung.arms), 'recipe')}, {_count(rates_in(rung), 'rate')} each{seeds}, {size}"


def advised(found: Recommendation, out: Path) -> RenderableType:
    """Scores of the last two, the evidence, and the command."""
    arm = found.arm
    took = f"{found.seconds / 60:.1f} of {found.budget / 60:.1f} minutes"
    without = [Text(f"left out for time: {', '.join(found.left_out)}", style="dim")] if found.left_out else []
    return Group(
        comparisons.compared(found.findings, str(out)),
        Text(f"Take {arm.arm}: {found.why}.", style="bold"),
        Text(f"{took}; what was run: {out / 'advice.json'}", style="dim"),
        *without,
        Text(shlex.join(found.command), style="cyan", no_wrap=True, overflow="ignore"),  # to be copied
    )
