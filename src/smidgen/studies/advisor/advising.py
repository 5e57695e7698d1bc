"""advise: arms, examples and seeds that fit a budget of time, successive halving, one recommendation."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from smidgen.common.atomic_files import read_json, write_files
from smidgen.common.errors import StudyError
from smidgen.data.resplitting import with_test
from smidgen.studies.advisor.recommendations import Recommendation, recommended, tuning_command
from smidgen.studies.advisor.run_times import RunTimes
from smidgen.studies.advisor.rungs import Rung, best_arms, best_rates, middle
from smidgen.studies.comparison.comparing import StudyRuns, compare
from smidgen.studies.comparison.findings import Findings
from smidgen.studies.comparison.run_store import Result
from smidgen.studies.comparison.study import Study, StudyArm
from smidgen.studies.rates import rates_around
from smidgen.studies.runners.opening import LOCAL
from smidgen.training.run.settings import Settings

ARMS = ("LN()", "BitFit()", "LoRA(rank=8)", "Pfeiffer", "Head()", "Full()")
RECORD = "advice.json"
SHARES = (0.2, 0.3)  # of the budget, for the first rung and for what is left before the last
HELD = 1000  # validation and test examples at most
BATCHES = 2  # that a run is timed on
SEEDS = 3  # of the last rung; more if all examples fit
MOST_SEEDS = 6
LAST_RATES = 2
SPARE = 0.9  # of what is left is planned for the last rung, because predicted times are rough


def advise(  # noqa: PLR0913 - options by keyword
    study: Study,
    out: str | os.PathLike[str],
    *,
    budget: float,
    jobs: int = 1,
    on: str = LOCAL,
    told: Callable[[Result], None] | None = None,
    begun: Callable[[Rung], None] | None = None,
    tracker: str | None = None,
) -> Recommendation:
    """Find the arm of a study that its task wants, in about so many seconds.

    The arms are timed on two batches each, and those that are too slow for the budget are left out. Then, rung by rung,
    half of the arms and half of their rates go on with more examples, as many as time allows, judged on validation
    alone; the last two meet with three seeds or more, and are tested. A rung is planned with the times of those before
    it; no run is broken off, so that the last one may end late. Killed, the same call goes on with what is left of the
    budget.

    Args:
        study: of one model and one task; its seeds and numbers of examples are not used.
        out: a study's folder; it holds the last rung, and the runs of all.
        budget: seconds.
        begun: is given each rung before it runs.
        jobs, on, tracker: as in `compare`.

    Raises:
        StudyError: several models or tasks, fewer than two arms, a budget too short to begin with, or no arm whose runs
            come to an end.
    """
    if len(study.models) != 1 or len(study.tasks) != 1 or len(study.arms) < 2:
        raise StudyError(
            "a budget wants one model, one task and two recipes or more, found "
            f"{len(study.models)}, {len(study.tasks)} and {len(study.arms)}"
        )
    return _Adviser(_capped(study), Path(out), budget, (on, jobs), told, begun or (lambda rung: None), tracker).advice()


def _capped(study: Study) -> Study:
    """The study with at most a thousand validation and test examples, where a source has them or they are cut off."""
    (data,) = study.tasks
    task, share = data.load(), study.validation
    limit = {**{split: HELD for split in ("validation", "test") if split in task.splits}, **(data.limit or {})}
    if isinstance(share, float):
        share = min(share, HELD / len(task.split("train")))
    capped = data.model_copy(update={"limit": limit or None})
    return study.model_copy(update={"tasks": (capped,), "validation": share, "tuning_seeds": 1})


def _width(rung: Rung) -> int:
    """How many rates each of its arms tries."""
    return max(len(rates or (0.0,)) for rates in rung.arms.values())


@dataclass(eq=False)
class _Adviser:
    """The state of one call."""

    study: Study
    out: Path
    budget: float
    place: tuple[str, int]  # where runs are made, and how many at once
    told: Callable[[Result], None] | None
    begun: Callable[[Rung], None]
    tracker: str | None
    rungs: list[Rung] = field(default_factory=list)

    def __post_init__(self) -> None:
        (data,) = self.study.tasks
        task = with_test(data.load(), validation=self.study.validation)
        self.data, self.total = data, len(task.split("train"))
        settings = Settings.of(self.study.settings)
        self.least = min(self.total, BATCHES * settings.batch_size)
        self.times = RunTimes(len(task.split("validation")), settings.epochs)
        self.known = self._read()

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - sum(rung.seconds or 0.0 for rung in self.rungs)

    def advice(self) -> Recommendation:
        """Climb the rungs."""
        timing = self._run(Rung(dict.fromkeys(self.study.arms), self.least, 1, False), timed=True)
        self._able(timing.results, "no arm came to the end of a first short run")
        first = self._first(timing.results)
        found, previous = self._run(first).results, first
        arms, rates = list(self.rungs[-1].arms), _width(self.rungs[-1])
        while len(arms) > 2:
            arms, rates = best_arms(found, max(2, -(-len(arms) // 2))), max(min(rates, LAST_RATES), rates // 2)
            self._able(found, "all runs of the first rung failed")
            if len(arms) <= 2:
                break
            previous = self._rung(found, arms, rates, previous)
            found = self._run(previous).results
        arms = best_arms(found, 2)
        last = self._run(self._last(found, arms, min(rates, LAST_RATES), previous))
        findings = Findings(last.study, last.results, last.store)
        self._able([r for r in last.results if r.test is not None], "all runs of the last rung failed")
        arm, why = recommended(findings)
        rate = next(result.rate for result in last.results if result.arm == arm.arm)
        assert arm.lr is not None
        command = tuning_command(last.study, self.data, arm.arm, rate, arm.lr)
        return Recommendation(arm, why, command, self.rungs, findings, self.budget, self.budget - self.left)

    def _able(self, results: Sequence[Result], otherwise: str) -> list[str]:
        """Arms with a run that came to its end."""
        found = [arm for arm in self.study.arms if any(r.arm == arm and r.error is None for r in results)]
        if not found:
            errors = next((f": {r.error}" for r in results if r.error), "")
            raise StudyError(otherwise + errors)
        return found

    def _first(self, timed: Sequence[Result]) -> Rung:
        """All arms and rates; where the budget is too short for that, fewer rates, then without the slowest arms."""
        grids = {r.arm: self._grid(r) for r in timed if r.error is None}
        rates, seconds = self.study.rates_each, SHARES[0] * self.left
        while self.times.examples(list(grids) * rates, seconds) < self.least:
            if rates > LAST_RATES:
                rates -= 1
            elif len(grids) > 2:
                del grids[max(grids, key=lambda arm: self.times.seconds([arm], self.least))]
            else:
                need = self.times.seconds(list(grids) * rates, self.least) / SHARES[0]
                raise StudyError(
                    f"a budget of {self.budget:.0f} s is too short for {len(grids)} arms of {rates} rates: "
                    f"{max(need, self.budget) / 60:.1f} min would do"
                )
        examples = min(self.total, self.times.examples(list(grids) * rates, seconds))
        return Rung({arm: middle(grid, rates) for arm, grid in grids.items()}, examples, 1, False)

    def _grid(self, timed: Result) -> tuple[float, ...]:
        """The rates that an arm would try."""
        arm = self.study.arms[timed.arm]
        return arm.lr or self.study.lr or tuple(rates_around(arm.parsed, timed.rate, self.study.trials))

    def _rung(self, found: Sequence[Result], arms: Sequence[str], rates: int, previous: Rung) -> Rung:
        """Half of the arms and half of their rates, with as many examples as a share of what is left allows."""
        examples = self.times.examples(list(arms) * rates, SHARES[1] * self.left)
        kept = {arm: best_rates(found, arm, rates) for arm in arms}
        return Rung(kept, self._between(examples, previous), 1, False)

    def _last(self, found: Sequence[Result], arms: Sequence[str], rates: int, previous: Rung) -> Rung:
        """The last two, with all that is left; more seeds where all examples fit."""
        seeds = SEEDS
        left = SPARE * self.left
        examples = self.times.examples(list(arms) * (rates + seeds - 1), left)
        while examples >= self.total and seeds < MOST_SEEDS:
            more = self.times.examples(list(arms) * (rates + seeds), left)
            if more < self.total:
                break
            seeds, examples = seeds + 1, more
        kept = {arm: best_rates(found, arm, rates) for arm in arms}
        return Rung(kept, self._between(examples, previous), seeds, True)

    def _between(self, examples: int, previous: Rung) -> int:
        """No fewer than the rung before had, and no more than there are."""
        return min(self.total, max(examples, previous.examples or 0))

    def _run(self, rung: Rung, timed: bool = False) -> StudyRuns:
        """Make a rung's runs, or what is missing of them, and learn from their times."""
        if len(self.rungs) < len(self.known):  # decided by an earlier call
            rung = self.known[len(self.rungs)]
        self.begun(rung)
        before = time.perf_counter()
        wanted = self._study(rung)
        on, jobs = self.place
        runs = compare(wanted, self.out, jobs=jobs, on=on, told=self.told, tested=rung.last, tracker=self.tracker)
        seconds = time.perf_counter() - before if rung.seconds is None else rung.seconds
        self.rungs.append(replace(rung, seconds=seconds))
        self._write()
        measured = dict(self.times.measured)
        for result in runs.results:
            took = result.costs.get("seconds")
            if took is not None:
                measured[result.arm] = (rung.examples or self.total, took)
        spent = sum(result.costs.get("seconds") or 0.0 for result in runs.results)
        overhead = 1.0 if timed or not spent else max(1.0, seconds / spent)
        self.times = replace(self.times, measured=measured, overhead=overhead)
        return runs

    def _study(self, rung: Rung) -> Study:
        """The study that a rung is; arms without rates, which are timed, take the one in the middle of their own."""
        own = self.study
        arms: dict[str, StudyArm] = {}
        for name, rates in rung.arms.items():
            grid = own.arms[name].lr or own.lr
            lr = rates or (None if grid is None else middle(grid, 1))
            arms[name] = own.arms[name].model_copy(update={"lr": lr})
        return Study.of({
            **own.model_dump(mode="json"), "arms": {name: arm.model_dump(mode="json") for name, arm in arms.items()},
            "lr": None, "trials": 1, "seeds": list(range(rung.seeds)), "reference": None,
            "examples": [rung.examples or "all"],
        })  # fmt: skip

    def _read(self) -> list[Rung]:
        """The rungs that an earlier call decided, if it had this study and budget."""
        path = self.out / RECORD
        if not path.is_file():
            return []
        found = read_json(path)
        if found["study"] != self.study.model_dump(mode="json") or found["budget"] != self.budget:
            raise StudyError(f"{path} is of another study or budget; choose another --out")
        return [Rung.from_json(rung) for rung in found["rungs"]]

    def _write(self) -> None:
        rungs = [asdict(rung) for rung in self.rungs]
        content = {"study": self.study.model_dump(mode="json"), "budget": self.budget, "rungs": rungs}
        write_files(self.out, {RECORD: json.dumps(content, indent=1).encode()})
