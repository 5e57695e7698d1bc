"""The command line's `search`: several rates of one recipe, and a table of what came of them."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import smidgen as sm
from smidgen.cli.options import (  # fmt: skip
    Batching,
    BatchSize,
    Data,
    Json,
    Kind,
    Label,
    Length,
    Limit,
    LimitValidation,
    Metric,
    Model,
    NewTokens,
    On,
    OnlyRead,
    Option,
    Out,
    Pooling,
    Precision,
    Quantize,
    RecipeText,
    Text,
    TuneDtype,
    dtype_of,
    limits_of,
    open_task,
)
from smidgen.cli.views import results, searches


def run_search(
    data: Data, out: Out, model: Model = "minilm", recipe: RecipeText = "LN()",
    lr: Annotated[list[float] | None, Option(help="a rate to try; may be given again; default: around its own")] = None,
    trials: Annotated[int, Option(help="so many rates, where none is named")] = 10,
    jobs: Annotated[int, Option(min=1, help="so many trials at once, each in a process of its own")] = 1,
    on: On = "local",
    seed: Annotated[list[int] | None, Option(help="each rate with each seed; may be given again; default: 0")] = None,
    epochs: Annotated[int, Option(min=1)] = 3,
    head_lr: Annotated[float | None, Option(help="learning rate of the head")] = None,
    batch_size: BatchSize = 32, max_length: Length = None,
    max_new_tokens: NewTokens = None,
    dtype: Precision = TuneDtype.float32, quantize: Quantize = None, only_read: OnlyRead = None,
    pooling: Pooling = None, limit: Limit = None, limit_validation: LimitValidation = None, text: Text = None,
    label: Label = None, kind: Kind = None,
    metric: Metric = None,
    batching: Annotated[Batching, Option(help="length: rows of like length meet, less padding")] = Batching.shuffle,
    cache: Annotated[bool | None, Option("--cache/--no-cache", help="of what lies below; default: if it pays")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Train a recipe at several learning rates; keep the best. Stopped, the same command goes on from there."""
    wanted, seeds = sm.parse(recipe), seed or [0]
    task = open_task(data, text, label, kind, metric, limits_of(limit, limit_validation))
    network, processor = sm.load(model, task=task, dtype=dtype_of(dtype, out), seed=seeds[0], quantize=quantize)
    progress = None if sys.stderr.isatty() else False  # a line per trial is enough for a file
    try:
        found = sm.search(
            network, wanted, task, out=out, processor=processor, lr=lr or None, seeds=seeds, trials=trials, jobs=jobs,
            on=on, say=results.note, progress=progress, epochs=epochs, head_lr=head_lr, batch_size=batch_size,
            max_length=max_length, max_new_tokens=max_new_tokens, pooling=pooling, batching=batching.value, cache=cache,
            only_read=only_read,
        )  # fmt: skip
    except KeyboardInterrupt:
        results.note("stopped; the same command goes on from there")
        raise typer.Exit(130) from None
    report = {**found.to_json(), "out": str(out), "files": results.sizes(out)}
    results.show(report, searches.searched(found, out), as_json)
