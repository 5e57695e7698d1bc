"""`compare --budget`: rung by rung on the screen, and the recommendation at the end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from smidgen.cli.views import comparisons, recommended_arms, results

if TYPE_CHECKING:
    from smidgen.studies.advisor.rungs import Rung
    from smidgen.studies.comparison.run_store import Result
    from smidgen.studies.comparison.study import Study


def run_advice(
    study: Study, out: Path, budget: float, place: tuple[str, int], tracker: str | None, as_json: bool
) -> None:
    """Find one arm within a budget of seconds, and show it."""
    from smidgen.studies.advisor.advising import advise
    from smidgen.studies.comparison.comparing import reopened
    from smidgen.studies.reports.comparison import write_report

    (on, jobs), progress = place, RungProgress()
    with progress:
        found = advise(
            study, out, budget=budget, jobs=jobs, on=on, told=progress.told, begun=progress.begun, tracker=tracker
        )
    write_report(reopened(out), f"smidgen compare --budget {budget:.0f}s --out {out}")
    results.show({"out": str(out), **found.to_json()}, recommended_arms.advised(found, out), as_json)


class RungProgress:
    """A line for each rung, and under it a bar on a terminal, a line for each run elsewhere."""

    def __init__(self) -> None:
        self._bar: comparisons.RunsBar | None = None

    def __enter__(self) -> RungProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def begun(self, rung: Rung) -> None:
        """A rung begins."""
        self._end()
        line = recommended_arms.rung_line(rung)
        results.note(line)
        if sys.stderr.isatty():
            self._bar = comparisons.RunsBar(line, recommended_arms.runs_of(rung))
            self._bar.__enter__()

    def told(self, result: Result) -> None:
        """A run is over."""
        if self._bar is None:
            results.note(f"  {comparisons.run_line(result)}")
        else:
            self._bar.told(result)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.__exit__()
            self._bar = None
