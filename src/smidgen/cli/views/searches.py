"""What a search looks like in a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from smidgen.cli.views import results

if TYPE_CHECKING:
    from smidgen.studies.trial import Search


def searched(found: Search, out: Path) -> RenderableType:
    """A search: its trials, the best one bold, and where the rest is."""
    head, *rows = found.rows()
    table = results.table([f"#{name}" if name else " " for name in head], [])
    for row, trial in zip(rows, found.trials, strict=True):
        table.add_row(*row, style="bold" if trial is found.best else "")
    title = Text(f"{found.recipe} on {found.task}: {found.metric} on validation", style="bold")
    return Group(title, table, results.listing(out), Text(f"each trial's run: {out / 'trials'}", style="dim"))
