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
    from smidgen.studies.comparison.study import Study


def rates_in(study: Study, rung: Rung) -> int:
    """How many rates each arm of a rung tries."""
    return max((len(rates) for rates in rung.arms.values() if rates), default=study.rates_each)


def runs_of(study: Study, rung: Rung) -> int:
    """How many runs a rung takes."""
    return len(rung.arms) * (rates_in(study, rung) + rung.seeds - 1)


def rung_line(study: Study, rung: Rung) -> str:
    """A rung in a line."""
    rates, seeds = rates_in(study, rung), f", {rung.seeds} seeds" if rung.seeds > 1 else ""
    return f"{len(rung.arms)} recipes, {rates} rates each{seeds}, {rung.examples or 'all'} examples"


def advised(found: Recommendation, out: Path) -> RenderableType:
    """Scores of the last two, the evidence, and the command."""
    arm = found.arm
    took = f"{found.seconds / 60:.1f} of {found.budget / 60:.1f} minutes"
    return Group(
        comparisons.compared(found.findings, out),
        Text(f"{arm.arm}, {found.why}.", style="bold"),
        Text(f"{took}; what was run: {out / 'advice.json'}", style="dim"),
        Text(shlex.join(found.command), style="cyan"),
    )
