"""What a comparison looks like in a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from smidgen.cli.views import results

if TYPE_CHECKING:
    from smidgen.studies.comparison.findings import Findings
    from smidgen.studies.comparison.run_store import Result

Told = Callable[["Result"], None]


def run_line(result: Result) -> str:
    """A run in a line."""
    size = "" if result.examples is None else f", {result.examples} examples"
    value = "–" if result.validation is None else f"{result.validation:.4f}"
    came = result.error or f"validation {result.metric} {value}"
    return f"{result.arm} on {result.task}{size}, {result.rate} {result.lr:g}, seed {result.seed}: {came}"


class RunsBar:
    """Runs done, the best of the present task, and the time that is left."""

    def __init__(self, name: str, runs: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(name, total=runs)
        self._best: Result | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def told(self, result: Result) -> None:
        """Another run is done."""
        from smidgen.studies.comparison.findings import ahead

        if self._best is None or self._best.cell != result.cell or ahead(result, self._best):
            self._best = result
        best = self._best
        value = "–" if best.validation is None else f"{best.validation:.3f}"
        self._bar.update(self._task, advance=1, description=f"{best.task}: best {value}, {best.arm}")


def compared(found: Findings, out: str) -> RenderableType:
    """Scores, differences, and where the report is."""
    from smidgen.studies.reports.comparison import difference_cells, score_cells

    parts: list[RenderableType] = []
    for make in (score_cells, difference_cells):
        title, head, rows = make(found)
        if rows:
            table = results.table(head, [])
            for row in rows:
                table.add_row(*row)
            parts += [Text(title, style="bold"), table]
    parts.append(Text(f"report: {out.rstrip('/')}/report.html", style="dim"))
    return Group(*parts)
