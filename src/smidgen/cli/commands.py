"""The command line: each command is one call of the Python API and a view of its result."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

import smidgen as sm
from smidgen.cli import (
    analyze_commands,
    chat_command,
    compare_command,
    export_command,
    search_command,
    serve_command,
)
from smidgen.cli.options import (  # fmt: skip
    AnyData,
    AnyDelta,
    AnyRecipe,
    Base,
    Batching,
    BatchSize,
    BatchTokens,
    DeltaFolder,
    Dtype,
    Format,
    Json,
    Kind,
    Label,
    Length,
    Limit,
    LimitValidation,
    Metric,
    Model,
    Most,
    NewTokens,
    OnlyRead,
    Option,
    Out,
    OwnDtype,
    Pooling,
    Precision,
    Quantize,
    RecipeText,
    SeveralData,
    Text,
    TuneDtype,
    Weights,
    data_options,
    dtype_of,
    limits_of,
    open_base_or_delta,
    open_delta,
    open_selection,
    open_task,
)
from smidgen.cli.sample_report import report_samples
from smidgen.cli.views import diagnoses, plans, results
from smidgen.common.argument_spelling import FIELDS, as_options
from smidgen.common.errors import DataError, DeltaError, SmidgenError
from smidgen.common.folder_lock import folder_lock_held
from smidgen.common.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UsageError: Any = typer.BadParameter.__mro__[1]  # of the click that this typer uses
app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
app.add_typer(analyze_commands.app, name="analyze")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"smidgen {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def smidgen_command(
    context: typer.Context,
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True)] = False,
    debug: Annotated[bool, Option("--debug", help="show tracebacks; anywhere in the line")] = False,
) -> None:
    """Tune a smidgen of a pretrained model. Begin with: smidgen demo"""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("demo")
def demo_command(out: Out = Path("smidgen-demo"), as_json: Json = False) -> None:
    """Train LayerNorms alone on BBC news in two minutes, compare with a plain head, predict."""
    from smidgen.cli.demonstration import INTRO, run_demo

    results.note(INTRO)
    result = run_demo(out, results.note)
    results.show(result.to_json(), results.demonstrated(result, out), as_json)


@app.command("plan")
def plan_command(
    model: Model, recipe: RecipeText = "LN()", data: AnyData = None, text: Text = None, label: Label = None,
    kind: Kind = None, pooling: Pooling = None, batch_size: BatchSize = 32, max_length: Length = None,
    dtype: Annotated[Dtype, Option("--dtype", help="of the base")] = Dtype.float32, quantize: Quantize = None,
    every: Annotated[bool, Option("--all", help="every tensor on its own line")] = False,
    recompute: Annotated[bool, Option("--recompute", help="activations computed twice, not kept")] = False,
    fits: Annotated[bool, Option("--fits", help="which methods and dtypes fit into which card")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Show what a recipe would train, and what it costs; nothing is trained."""
    from smidgen.inference.model_shapes import needs_shapes_only

    wanted = sm.parse(recipe)
    task = None if data is None else open_task(data, text, label, kind)
    shapes_only = fits or needs_shapes_only(model)
    if quantize and shapes_only:
        raise SmidgenError(
            "--quantize counts the tensors of a base that is loaded: not with --fits, nor by shapes alone"
        )
    if fits:
        _show_fits(model, task, wanted, (batch_size, max_length, recompute), as_json)
        return
    if shapes_only:
        network = sm.load_shapes(model, task, dtype=dtype.value)
    else:
        network, _ = sm.load(model, task=task, dtype=dtype.value, quantize=quantize)
    result = sm.plan(network, wanted, pooling=pooling, batch_size=batch_size, length=max_length, recompute=recompute)
    results.show(result.to_json(), plans.plan_view(result, every), as_json)


def _show_fits(
    model: str, task: sm.Task | None, wanted: sm.Recipe, step: tuple[int, int | None, bool], as_json: bool
) -> None:
    """A step of several recipes in two dtypes, and the cards that hold it. step: rows, tokens, recompute."""
    from smidgen.training.memory.card_sizes import RECIPES

    (batch_size, length, recompute), rows = step, list[sm.DeviceFit]()
    recipes = list(dict.fromkeys((*RECIPES, str(wanted))))
    for dtype in (Dtype.float32, Dtype.bfloat16):
        network = sm.load_shapes(model, task, dtype=dtype.value)
        for row in sm.device_fits(network, recipes, batch_size=batch_size, length=length, recompute=recompute):
            results.note(plans.fit_line(row))
            rows.append(row)
    report = {"model": model, "batch_size": batch_size, "length": length, "recompute": recompute}
    report["fits"] = [row.to_json() for row in rows]
    results.show(report, plans.fits_view(model, rows, batch_size, length), as_json)


@app.command("doctor")
def doctor_command(
    model: Model, recipe: AnyRecipe = None, data: AnyData = None, text: Text = None, label: Label = None,
    kind: Kind = None, quantize: Quantize = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Look a model over: sites, norms, buffers, and whether what a recipe (or each method) attaches acts and merges."""
    wanted = None if recipe is None else sm.parse(recipe)
    task = None if data is None else open_task(data, text, label, kind)
    network, _ = sm.load(model, task=task, quantize=quantize)
    result = sm.doctor(network, wanted)
    results.show(result.to_json(), diagnoses.diagnosis_view(result, recipe is not None), as_json)
    if wanted is not None and (result.faults or result.findings[0].refused):
        raise typer.Exit(1)


@app.command()
def tune(
    model: Model, data: SeveralData, out: Out, weight: Weights = None, recipe: RecipeText = "LN()", seed: int = 0,
    epochs: Annotated[int, Option(min=1)] = 3,
    lr: Annotated[float | None, Option(help="default: the method's own")] = None,
    head_lr: Annotated[float | None, Option(help="learning rate of the head")] = None,
    batch_size: BatchSize = 32, batch_tokens: BatchTokens = None, max_length: Length = None,
    max_new_tokens: NewTokens = None, dtype: Precision = TuneDtype.float32, quantize: Quantize = None,
    only_read: OnlyRead = None,
    max_memory: Annotated[str | None, Option(help="such as 4GB: larger batches are computed in micro-batches")] = None,
    recompute: Annotated[bool, Option("--recompute", help="activations computed twice, not kept: less memory")] = False,
    pooling: Pooling = None, limit: Limit = None, limit_validation: LimitValidation = None, text: Text = None,
    label: Label = None, kind: Kind = None,
    metric: Metric = None, as_json: Json = False,
    batching: Annotated[Batching, Option(help="less padding: rows of like length, or packed")] = Batching.shuffle,
    cache: Annotated[bool | None, Option("--cache/--no-cache", help="of what lies below; default: if it pays")] = None,
    selection: Annotated[str | None, Option(help="keep what this selection, or this delta, keeps")] = None,
    samples: Annotated[int | None, Option(min=0, help="of what is written, for report.md; chat: 4 by default")] = None,
) -> None:  # fmt: skip
    """Train a recipe on a task. Stopped at any moment, the same command goes on from there."""
    from smidgen.delta.mergeable import folds
    from smidgen.training.run.run_folder import RunFolder

    wanted, limits = sm.parse(recipe), limits_of(limit, limit_validation)
    task = open_task(data, text, label, kind, metric, limits, weight)
    network, processor = sm.load(model, task=task, dtype=dtype_of(dtype, out), seed=seed, quantize=quantize)
    kept = open_selection(selection, network) if selection else None
    already = RunFolder(out).finished
    try:
        delta = sm.fit(
            network, wanted, task, out=out, processor=processor, selection=kept, seed=seed, epochs=epochs, lr=lr,
            head_lr=head_lr, batch_size=batch_size, batch_tokens=batch_tokens, max_length=max_length,
            max_new_tokens=max_new_tokens, pooling=pooling, batching=batching.value, cache=cache,
            only_read=only_read, max_memory=max_memory, recompute=recompute,
        )  # fmt: skip
    except KeyboardInterrupt:
        state = RunFolder(out, writer=False).resume()
        step = state.progress.step if state else 0
        results.note(f"stopped at step {step}; the same command goes on from there")
        raise typer.Exit(130) from None
    report_samples(out, network, processor, task, delta, samples)
    report = {**_summary(delta), "out": str(out), "already_finished": already, "files": results.sizes(out)}
    told = data_options(data, text, label, kind, metric)
    results.show(report, results.tuned(delta, out, task, told, already, folds(delta.recipe, delta.pooling)), as_json)


app.command("search")(search_command.run_search)
app.command("chat")(chat_command.run_chat)
app.command("serve")(serve_command.run_serve)
app.command("export")(export_command.run_export)
app.command("compare")(compare_command.run_compare)
app.command("report")(compare_command.run_report)


@app.command("evaluate")
def evaluate_command(
    data: SeveralData, delta: AnyDelta = None, model: Base = None,
    split: Annotated[str, Option(help="train, validation or test")] = "test",
    text: Text = None, label: Label = None, kind: Kind = None, metric: Metric = None, limit: Most = None,
    batch_size: BatchSize = 64, max_length: Length = None, max_new_tokens: NewTokens = None, dtype: OwnDtype = None,
    quantize: Quantize = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Metrics of a delta, or of a base alone, on a split of a task."""
    task = open_task(data, text, label, kind, metric, limit and {split: limit})
    trained, network, processor = open_base_or_delta(delta, model, dtype, task, quantize)
    result = sm.evaluate(
        network, task, delta=trained, split=split, processor=processor, batch_size=batch_size, max_length=max_length,
        max_new_tokens=max_new_tokens,
    )  # fmt: skip
    named: object = data[0] if len(data) == 1 else data
    report = {"delta": delta, "data": named, "split": split, "metric": result.metric, "scores": result.values,
              "examples": len(result.references), "truncated": result.truncated}  # fmt: skip
    results.show(
        report, results.evaluated(result, str(trained.recipe) if trained else "base", task.name, split), as_json
    )


@app.command("predict")
def predict_command(
    delta: DeltaFolder, model: Base = None,
    text: Annotated[list[str] | None, Option("--text", help="a text; may be given again")] = None,
    pair: Annotated[list[str] | None, Option("--pair", help="its second text, for tasks of two")] = None,
    file: Annotated[Path | None, Option("--file", help=".csv, .jsonl, ... of the task's columns, or lines")] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="of a continuation (causal-lm)")] = 64,
    dtype: OwnDtype = None, quantize: Quantize = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Labels with probabilities for new texts; continuations for a causal language model."""
    from smidgen.inference.prediction import predict, read_texts

    if file and (text or pair):
        raise DataError("give --file, or --text and --pair, not both")
    trained, network, processor = open_delta(delta, model, dtype, quantize)
    texts, pairs = read_texts(file, trained) if file else (text or [], pair)
    rows = predict(network, texts, delta=trained, processor=processor, pairs=pairs, max_new_tokens=max_new_tokens)
    results.show({"predictions": [asdict(row) for row in rows]}, results.predictions(rows), as_json)


@app.command("merge")
def merge_command(
    delta: DeltaFolder, out: Out, model: Base = None,
    dtype: Annotated[Dtype | None, Option("--dtype", help="of the merged model; default: the base's")] = None,
    quantize: Quantize = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Fold a delta into its base: a plain model and its tokenizer, without any cost at inference."""
    import torch

    if out.is_file() or (out.is_dir() and any(not p.name.startswith(".") for p in out.iterdir())):
        raise DeltaError(f"{out} is not empty; choose another --out")
    with folder_lock_held(out):
        trained, network, processor = open_delta(delta, model, quantize=quantize)
        merged = sm.merge(network, trained, dtype=getattr(torch, dtype) if dtype else None)
        cast("PreTrainedModel", merged).save_pretrained(out)
        processor.save_pretrained(out)
    report = {"class": type(merged).__name__, "out": str(out), "files": results.sizes(out)}
    results.show(report, results.listing(out), as_json)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="folder of a delta or of a PEFT adapter")],
    target: Annotated[Path, typer.Argument(help="folder to write")],
    to: Annotated[Format, Option("--to", help="what to write")],
    model: Base = None, data: AnyData = None, dtype: OwnDtype = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Turn a delta into an adapter of HF PEFT, or the other way round (then --model is needed)."""
    from smidgen.delta.hf_peft.conversion import from_peft, to_peft

    if to is Format.smidgen and model is None:
        raise DeltaError("an adapter is read for a base: give --model, and --data if it has a new head")
    with folder_lock_held(target):
        if to is Format.peft:
            trained, network, _ = open_delta(source, model, dtype)
            to_peft(trained, network, target)
        else:
            task = None if data is None else open_task(data)
            network, _ = sm.load(str(model), task=task, dtype=dtype or "float32")
            from_peft(source, network).save(target)
    results.show({"to": to, "out": str(target), "files": results.sizes(target)}, results.listing(target), as_json)


@app.command()
def inspect(delta: Annotated[str, typer.Argument(help="folder or hub id")], as_json: Json = False) -> None:
    """What a delta is: recipe, base, values, labels, scores, files."""
    trained = sm.Delta.load(delta)
    report = {**trained.to_json(), **_summary(trained), "files": results.sizes(Path(delta))}
    results.show(report, results.inspected(trained, Path(delta)), as_json)


def _summary(delta: sm.Delta) -> dict[str, object]:
    kept = {key: delta.info.get(key) for key in ("scores", "best_epoch", "steps")}
    return {"recipe": str(delta.recipe), "trained": delta.trained, "head_values": delta.head_values, **kept}


def _options(line: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """Parameter -> its option and, of a switch, the option for False, of the command that a line calls."""
    command: Any = typer.main.get_command(app)
    for word in line:
        command = getattr(command, "commands", {}).get(word, command)
    flags = (p for p in command.params if f"--{p.name.replace('_', '-')}" in p.opts and p.name not in FIELDS)
    return {p.name: (p.opts[-1], p.secondary_opts[-1] if p.secondary_opts else None) for p in flags}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = list(sys.argv[1:] if args is None else args)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    line = [word for word in given if word != "--debug"]
    with as_options(_options(line)):
        try:
            with results.one_line_warnings():
                return app(line, prog_name="smidgen", standalone_mode=False, obj=line) or 0
        except Exception as error:
            if "--debug" in given:
                raise
            mistake = isinstance(error, SmidgenError | UsageError | OSError)
            text = error.format_message() if isinstance(error, UsageError) else error
            results.error(text if mistake else f"{type(error).__name__}: {error} (a bug; --debug shows where)")
            return 2 if mistake else 1
