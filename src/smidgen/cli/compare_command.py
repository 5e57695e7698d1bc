"""The command line's `compare` and `report`: a study's runs, and its report from them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smidgen.cli import advice_progress
from smidgen.cli.options import Json, Label, Metric, On, Option, Text
from smidgen.cli.views import comparisons, results

if TYPE_CHECKING:
    from smidgen.studies.comparison.comparing import StudyRuns
    from smidgen.studies.comparison.run_store import Result
    from smidgen.studies.comparison.study import Study

Many = list[str] | None


def run_compare(
    out: Annotated[str, Option(help="folder to write, or a URL of fsspec: s3://, gs://, ...")],
    study: Annotated[Path | None, typer.Argument(help="a study.toml; or name its parts by options")] = None,
    model: Annotated[Many, Option(help="may be given again; default: minilm")] = None,
    data: Annotated[Many, Option(help="a task's data; may be given again")] = None,
    text: Text = None,
    label: Label = None,
    metric: Metric = None,
    recipe: Annotated[Many, Option(help="an arm; may be given again; the others are compared with the first")] = None,
    lr: Annotated[list[float] | None, Option(help="a rate that each arm tries; default: around its own")] = None,
    trials: Annotated[int, Option(min=1, help="so many rates for each arm, where none is named")] = 4,
    seed: Annotated[list[int] | None, Option(help="may be given again; default: 0, 1 and 2")] = None,
    examples: Annotated[Many, Option(help='to train on: a number, or "all"; may be given again')] = None,
    margin: Annotated[float, Option(help="differences below it count as none")] = 0.02,
    epochs: Annotated[int, Option(min=1)] = 3,
    batch_size: Annotated[int, Option(min=1)] = 32,
    max_length: Annotated[int | None, Option(min=1, help="tokens per text")] = None,
    jobs: Annotated[int, Option(min=1, help="so many runs at once, each in a process of its own")] = 1,
    on: On = "local",
    budget: Annotated[str | None, Option(help="20min, 1h30m: find one recipe within it, by successive halving")] = None,
    tracker: Annotated[str | None, Option(help="tensorboard, trackio or wandb")] = None,
    as_json: Json = False,
) -> None:
    """Compare recipes fairly: equal trials, rates chosen on validation, tested once. Stopped, it goes on from there."""
    from smidgen.studies.advisor.advising import ARMS
    from smidgen.studies.advisor.budgets import seconds_of
    from smidgen.studies.comparison.comparing import compare
    from smidgen.studies.comparison.study import Study
    from smidgen.studies.study_place import URL

    if study is not None:
        parts = {"model": model, "data": data, "recipe": recipe, "lr": lr, "seed": seed, "examples": examples,
                 "text": text, "label": label, "metric": metric}  # fmt: skip
        given = [f"--{name}" for name, value in parts.items() if value]
        if given:
            raise typer.BadParameter(f"{given[0]} is named by {study}; leave it out")
        wanted = Study.read(study)
    else:
        if len(data or []) != 1 and (text or label or metric):
            raise typer.BadParameter("--text, --label and --metric are of one --data; write several tasks into a file")
        arms = recipe or (ARMS if budget is not None else [])
        columns = {"text": text, "label": label, "metric": metric}
        wanted = Study.of({
            "name": out.rstrip("/").rpartition("/")[2], "models": model or ["minilm"], "arms": {r: r for r in arms},
            "tasks": [{"data": d, **columns} for d in data or []],
            "lr": lr, "trials": trials, "seeds": seed or [0, 1, 2], "margin": margin,
            "examples": [e if e == "all" else _number(e) for e in examples or ["all"]],
            "settings": {"epochs": epochs, "batch_size": batch_size, "max_length": max_length},
        })  # fmt: skip
    seconds = None if budget is None else seconds_of(budget)
    if seconds is not None and (seed or examples):
        raise typer.BadParameter(f"--{'seed' if seed else 'examples'} is chosen by --budget; leave it out")
    if seconds is not None and URL.match(out):
        raise typer.BadParameter(f"--out {out}: with --budget it is a folder of this machine")
    try:
        if seconds is not None:
            advice_progress.run_advice(wanted, Path(out), seconds, (on, jobs), tracker, as_json)
            return
        with _progress(wanted) as told:
            found = compare(wanted, out, jobs=jobs, on=on, told=told, tracker=tracker)
    except KeyboardInterrupt:
        results.note("stopped; the same command goes on from there")
        raise typer.Exit(130) from None
    _show(found, out, as_json)


def run_report(
    folder: Annotated[str, typer.Argument(help="of a study that compare made, or its URL")],
    as_json: Json = False,
) -> None:
    """Write the report of a study again, from its runs; nothing is trained."""
    from smidgen.studies.comparison.comparing import reopened

    _show(reopened(folder), folder, as_json)


def _show(found: StudyRuns, out: str, as_json: bool) -> None:
    from smidgen.studies.reports.comparison import write_report

    findings = write_report(found, f"smidgen compare --out {out}")
    report = {"out": out, "runs": len(found.results), "failed": len(found.failed), "findings": findings.to_json()}
    results.show(report, comparisons.compared(findings, out), as_json)
    if found.failed:
        raise typer.Exit(1)


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f'--examples {text!r} is neither a number nor "all"') from None


@contextmanager
def _progress(study: Study) -> Iterator[comparisons.Told]:
    """A bar with what is best so far on a terminal, a line for each run elsewhere."""
    if not sys.stderr.isatty():
        done = 0

        def line(result: Result) -> None:
            nonlocal done
            done += 1
            results.note(f"{done} of {study.runs}: {comparisons.run_line(result)}")

        yield line
        return
    with comparisons.RunsBar(study.name, study.runs) as bar:
        yield bar.told
