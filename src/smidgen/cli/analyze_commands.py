"""The command line's `analyze`: where fine-tuning happens in a model, in the terminal and as a report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import smidgen as sm
from smidgen.cli.options import (
    BatchSize,
    Data,
    Json,
    Label,
    Length,
    Limit,
    Metric,
    Model,
    Option,
    Out,
    Pooling,
    Text,
    open_task,
)
from smidgen.cli.views import analyses, results
from smidgen.common.argument_spelling import KINDS
from smidgen.common.errors import DeltaError, ModelError
from smidgen.common.folder_lock import folder_lock_held

if TYPE_CHECKING:
    from smidgen.studies.experiments.parameter_changes import Changes
    from smidgen.studies.reports.report import Report

AnyModel = Annotated[str | None, Option("--model", help="base to fine-tune: built-in name, folder, or hub id")]
Tasks = Annotated[list[str] | None, Option("--data", help="a task to fine-tune on; may be given again")]
ReportFolder = Annotated[Path | None, Option("--out", help="folder for report.html, report.json and pictures")]
TaskKind = Annotated[str | None, Option("--task-kind", help=", ".join(KINDS))]
SELECT = "LN() | Select('fisher', keep=0.1)"
TRANSFER = ("What the task left out makes of each selection", "Differences, paired by task and seed")
TRUST = ("How many examples are enough", "What the selection depends on")
CHANGES, FISHER = ("Change by component",), ("By component", "By term")  # the tables for the terminal

app = typer.Typer(help="Where fine-tuning happens, and what a selection is worth.", invoke_without_command=True)


@app.callback()
def analyze_command(context: typer.Context) -> None:
    """Where fine-tuning happens, and what a selection is worth."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("changes")
def changes_command(
    context: typer.Context, model: AnyModel = None, data: Tasks = None,
    base: Annotated[str | None, Option(help="a model to start from, instead of --model and --data")] = None,
    tuned: Annotated[str | None, Option(help="the same fine-tuned: a model, or a delta's folder")] = None,
    recipe: Annotated[str, Option("--recipe", help="what to train")] = "Full()",
    seeds: Annotated[int, Option(min=1, help="runs per task")] = 3, epochs: Annotated[int, Option(min=1)] = 3,
    lr: Annotated[float | None, Option(help="default: the method's own")] = None,
    weight_decay: Annotated[float, Option(help="of the trained values")] = 0.0,
    batch_size: BatchSize = 32, max_length: Length = None, pooling: Pooling = None, limit: Limit = None,
    component: Annotated[list[str] | None, Option(help="only this one ('output LN'); may be given again")] = None,
    out: ReportFolder = None, as_json: Json = False,
) -> None:  # fmt: skip
    """How far each component moves in fine-tuning, in four measures: by experiment, or between two models."""
    context.with_resource(folder_lock_held(out))
    wanted = sm.parse(recipe)
    if (model is None) == (base is None and tuned is None):
        raise ModelError("give --model and --data to fine-tune, or --base and --tuned to compare two models")
    if model is not None:
        from smidgen.studies.experiments.tuning_changes import analyze_changes

        result = analyze_changes(
            model, _tasks_named(data, limit), out=out, say=results.note, recipe=wanted, seeds=seeds, epochs=epochs,
            lr=lr, weight_decay=weight_decay, batch_size=batch_size, max_length=max_length, pooling=pooling,
        )  # fmt: skip
    else:
        result = _comparison(base, tuned)
    from smidgen.studies.reports.parameter_changes import change_report

    result = result.only(component) if component else result
    _show(change_report(result, _command(context)), CHANGES, out, as_json)


@app.command("fisher")
def fisher_command(
    context: typer.Context, model: Model, data: Data,
    kind: Annotated[str, Option(help="empirical, true or expected")] = "empirical",
    examples: Annotated[int, Option(min=1, help="of the split")] = 1024,
    recipe: Annotated[str | None, Option("--recipe", help="what to measure; default: all norms")] = None,
    delta: Annotated[str | None, Option(help="measure at this delta instead of at the base")] = None,
    split: Annotated[str, Option(help="train, validation or test")] = "train", seed: int = 0,
    batch_size: BatchSize = 32, max_length: Length = None, pooling: Pooling = None,
    text: Text = None, label: Label = None, task_kind: TaskKind = None, metric: Metric = None,
    out: ReportFolder = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Where Fisher information lies: total mass and mean per value by component, layer and term."""
    context.with_resource(folder_lock_held(out))
    from smidgen.importance.fisher_information import fisher
    from smidgen.studies.experiments.fisher_mass import FisherMass
    from smidgen.studies.reports.fisher_mass import fisher_report

    task = open_task(data, text, label, task_kind, metric)
    trained = None if delta is None else sm.Delta.load(delta)
    network, processor = sm.load(model, task=task, delta=trained, seed=seed)
    found = fisher(
        network, task, recipe, trained, examples, kind, split=split, seed=seed, processor=processor,
        batch_size=batch_size, max_length=max_length, pooling=pooling,
    )  # fmt: skip
    info = {"examples": getattr(found, "examples", examples), "split": split, "recipe": recipe, "delta": delta}
    result = FisherMass.of(network, found, task=task.name, kind=kind, info=info)
    _show(fisher_report(result, _command(context)), FISHER, out, as_json)


@app.command("transfer")
def transfer_command(
    context: typer.Context, model: Model, data: Tasks = None,
    recipe: Annotated[str, Option("--recipe", help="methods with one Select")] = SELECT,
    target: Annotated[list[str] | None, Option(help="task to leave out; all in turn by default")] = None,
    how: Annotated[str, Option(help="how scores are combined: mean, rank or union")] = "mean",
    seeds: Annotated[int, Option(min=1, help="runs per task and arm")] = 3, epochs: Annotated[int, Option(min=1)] = 3,
    lr: Annotated[float | None, Option(help="default: the method's own")] = None,
    split: Annotated[str, Option(help="what is scored: validation or test")] = "test",
    batch_size: BatchSize = 32, max_length: Length = None, pooling: Pooling = None, limit: Limit = None,
    out: ReportFolder = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Whether what some tasks select serves a task that they have not seen."""
    context.with_resource(folder_lock_held(out))
    from smidgen.studies.experiments.selection_transfer import measure_transfer
    from smidgen.studies.reports.selection_transfer import transfer_report

    tasks = [open_task(source, limit=limit) for source in data or []]
    result = measure_transfer(
        model, tasks, sm.parse(recipe), out=out, say=results.note, how=how, seeds=seeds, split=split,
        targets=target or None, epochs=epochs, lr=lr, batch_size=batch_size, max_length=max_length, pooling=pooling,
    )  # fmt: skip
    _show(transfer_report(result, _command(context)), TRANSFER, out, as_json)


@app.command("select")
def select_command(
    context: typer.Context, model: Model, out: Out, data: Tasks = None,
    recipe: Annotated[str, Option("--recipe", help="methods with one Select")] = SELECT,
    how: Annotated[str, Option(help="how scores of several tasks are combined: mean, rank or union")] = "mean",
    seed: int = 0, batch_size: BatchSize = 32, max_length: Length = None, pooling: Pooling = None,
    limit: Limit = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Choose on one task, or on several together, and save the choice for `smidgen tune --selection`."""
    context.with_resource(folder_lock_held(out))
    from smidgen.studies.experiments.selection_transfer import choose_on

    tasks = [open_task(source, limit=limit) for source in data or []]
    chosen = choose_on(
        model, tasks, sm.parse(recipe), how=how, seed=seed, batch_size=batch_size, max_length=max_length,
        pooling=pooling,
    )  # fmt: skip
    chosen.save(out)
    report = {"recipe": recipe, "kept": chosen.kept, "candidates": chosen.candidates, "out": str(out)}
    results.show({**report, "files": results.sizes(out)}, analyses.selection_view(chosen, out), as_json)


@app.command("trust")
def trust_command(
    context: typer.Context, model: Model, data: Data,
    recipe: Annotated[str, Option("--recipe", help="methods with one Select by fisher")] = SELECT,
    count: Annotated[list[int] | None, Option(help="numbers of examples to compare; may be given again")] = None,
    seeds: Annotated[int, Option(min=2, help="draws and heads to compare")] = 3,
    batch_size: BatchSize = 32, max_length: Length = None, pooling: Pooling = None,
    text: Text = None, label: Label = None, task_kind: TaskKind = None, metric: Metric = None,
    out: ReportFolder = None, as_json: Json = False,
) -> None:  # fmt: skip
    """How a selection changes with the number of examples, the head and the kind of Fisher information."""
    context.with_resource(folder_lock_held(out))
    from smidgen.studies.experiments.fisher_stability import COUNTS, measure_stability
    from smidgen.studies.reports.fisher_stability import trust_report

    task = open_task(data, text, label, task_kind, metric)
    result = measure_stability(
        model, task, sm.parse(recipe), counts=count or COUNTS, seeds=seeds, say=results.note, batch_size=batch_size,
        max_length=max_length, pooling=pooling,
    )  # fmt: skip
    _show(trust_report(result, _command(context)), TRUST, out, as_json)


def _tasks_named(data: list[str] | None, limit: int | None) -> list[sm.Task]:
    if not data:
        raise ModelError("give at least one --data to fine-tune on")
    return [open_task(source, limit=limit) for source in data]


def _comparison(base: str | None, tuned: str | None) -> Changes:
    """Between two models, or a delta and its base."""
    from smidgen.studies.experiments.parameter_changes import compare_changes
    from smidgen.studies.experiments.tuning_changes import change_of

    if tuned is None:
        raise ModelError("give --tuned as well: the fine-tuned model, or a delta's folder")
    if (Path(tuned) / "delta.json").is_file():
        delta = sm.Delta.load(tuned)
        name = base or delta.base.name
        if not name:
            raise DeltaError("the delta does not say where its base is; give --base")
        return change_of(sm.load(name, delta=delta, dtype=delta.base.dtype)[0], delta)
    if base is None:
        raise ModelError(f"{tuned} is no delta, so --base is needed as well")
    return compare_changes(sm.load(base)[0], sm.load(tuned)[0])


def _show(result: Report, shown: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """The result in the terminal, or as JSON; the report in a folder if one is wanted."""
    if out is not None:
        result.write(out)
    found = {**result.data, "summary": list(result.summary), "out": None if out is None else str(out)}
    results.show(found, analyses.report_view(result, shown, out), as_json)


def _command(context: typer.Context) -> str:
    """The command line as it was given, for the report's last line."""
    return shlex.join(["smidgen", *(context.obj or [])])
