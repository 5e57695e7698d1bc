"""What the commands share: the options, and how a task and a delta are opened from them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import smidgen as sm
from smidgen.cli.views import results
from smidgen.common.argument_spelling import KINDS, SCHEME_NAMES
from smidgen.common.errors import DeltaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from smidgen.data.processor import Processor
    from smidgen.data.task import Limit as DataLimit

Option = typer.Option

Dtype = StrEnum("Dtype", "float32 bfloat16 float16 float64")
TuneDtype = StrEnum("TuneDtype", "auto float32 bfloat16 float16 float64")
Scheme = StrEnum("Scheme", [(name, name) for name in SCHEME_NAMES])  # type: ignore[misc]
Format = StrEnum("Format", "peft smidgen")
Exports = StrEnum("Exports", "safetensors peft gguf onnx")
Batching = StrEnum("Batching", "shuffle length pack")
Model = Annotated[str, Option("--model", help="built-in name (minilm, smollm2), folder, or hub id")]
Base = Annotated[str | None, Option("--model", help="the delta's base, if it is not where it was")]
RecipeText = Annotated[str, Option("--recipe", help="what to train, such as 'LN() + LoRA(rank=8)'")]
AnyRecipe = Annotated[str | None, Option("--recipe", help="default: every method at its defaults")]
Data = Annotated[str, Option("--data", help="bbc-news, a file, a folder of split files, images or sounds, or hub id")]
SeveralData = Annotated[list[str], Option("--data", help="as above; given again, the data are mixed")]
Weights = Annotated[list[float] | None, Option("--weight", help="proportion of each --data, in their order")]
AnyData = Annotated[str | None, Option("--data", help="data that shapes the head")]
DeltaFolder = Annotated[str, Option("--delta", help="folder of a delta, or hub id")]
AnyDelta = Annotated[str | None, Option("--delta", help="folder of a delta, or hub id; without it the base alone")]
Out = Annotated[Path, Option("--out", help="folder to write")]
Text = Annotated[list[str] | None, Option("--text", help="text column; twice for two texts")]
Label = Annotated[str | None, Option("--label", help="label column")]
Kind = Annotated[str | None, Option("--kind", help=", ".join(KINDS))]
Metric = Annotated[str | None, Option("--metric", help="metric that counts")]
Limit = Annotated[int | None, Option("--limit", min=1, help="use so many training examples")]
LimitValidation = Annotated[int | None, Option("--limit-validation", min=1, help="validate on so many examples")]
Most = Annotated[int | None, Option("--limit", min=1, help="use so many examples of the split")]
BatchSize = Annotated[int, Option("--batch-size", min=1)]
BatchTokens = Annotated[int | None, Option("--batch-tokens", min=1, help="fill batches to so many tokens, not rows")]
NewTokens = Annotated[
    int | None, Option("--max-new-tokens", min=1, help="of what the model writes, for bleu, rougeL, ...")
]
Length = Annotated[int | None, Option("--max-length", min=1, help="tokens per text")]
Pooling = Annotated[str | None, Option("--pooling", help="first, mean or last; default is the model's own")]
OwnDtype = Annotated[Dtype | None, Option("--dtype", help="of the base; default as in training")]
Precision = Annotated[TuneDtype, Option("--dtype", help="of the base, not of what is trained; auto: the faster")]
Quantize = Annotated[
    Scheme | None, Option("--quantize", help="store the base's linear maps so; default: as in training, else none")
]
OnlyRead = Annotated[
    bool | None, Option("--only-read/--all-rows", help="last block for the token read; default: if exact")
]
On = Annotated[str, Option("--on", help="local; ray: Ray on this machine; auto, ray://...: a cluster of Ray that runs")]
Json = Annotated[bool, Option("--json", help="one JSON object on stdout")]


def open_task(
    data: str | list[str], text: list[str] | None = None, label: str | None = None, kind: str | None = None,
    metric: str | None = None, limit: DataLimit = None, weights: list[float] | None = None,
) -> sm.Task:  # fmt: skip
    """The task that the options name, one of several --data mixed, described in one line on stderr."""
    names = [data] if isinstance(data, str) else data
    if len(names) == 1 and not weights:
        task = sm.Task.load(names[0], text=text or None, label=label, kind=kind, metric=metric, limit=limit)
    else:
        each = [sm.Task.load(name, text=text or None, label=label, kind=kind, metric=metric) for name in names]
        task = sm.mix_tasks(each, weights or None, limit=limit)
    results.note(results.described(task))
    return task


def limits_of(train: int | None, validation: int | None) -> DataLimit:
    """What --limit and --limit-validation leave of the splits."""
    given = {"train": train, "validation": validation}
    return {split: most for split, most in given.items() if most is not None} or None


def data_options(
    data: list[str], text: list[str] | None, label: str | None, kind: str | None, metric: str | None
) -> list[str]:
    """The options that open the same task, its training examples apart, in another command."""
    single = {"--label": label, "--kind": kind, "--metric": metric}
    given = [*(("--data", name) for name in data), *(("--text", name) for name in text or ()), *single.items()]
    return [word for option, value in given if value is not None for word in (option, value)]


def dtype_of(choice: str, out: Path) -> str:
    """What "auto" means: as recorded in `out` if it holds an earlier start, else as measured; said on stderr."""
    import torch

    from smidgen.common.atomic_files import read_json
    from smidgen.inference.fastest_dtype import fastest

    if choice != "auto":
        return choice
    for name in ("run.json", "search.json"):
        recorded = read_json(out / name).get("asked", {}).get("dtype") if (out / name).is_file() else None
        if recorded is not None:
            return str(recorded)
    found = fastest("cuda" if torch.cuda.is_available() else "cpu")
    results.note(str(found))
    return str(found.dtype)[6:]


def open_selection(source: str, network: PreTrainedModel) -> sm.Selection:
    """The selection in a folder: one that was saved, or that of a delta."""
    if (Path(source) / "delta.json").is_file():
        return sm.selection_of(network, sm.Delta.load(source))
    return sm.Selection.load(source)


def open_base_or_delta(
    delta: str | None, model: str | None, dtype: str | None = None, task: sm.Task | None = None,
    quantize: str | None = None,
) -> tuple[sm.Delta | None, PreTrainedModel, Processor]:  # fmt: skip
    """A delta with its base and processor; without a delta the base alone, as a task takes it.

    Raises:
        DeltaError: neither is named, or the base has no head for the task but a random one.
    """
    from smidgen.sites.task_head import head_names

    if delta is not None:
        return open_delta(delta, model, dtype, quantize)
    if model is None:
        raise DeltaError("give --delta, the folder of a run, or --model for a base alone")
    network, processor = sm.load(model, task=task, dtype=dtype or "float32", quantize=quantize)
    if task is not None and head_names(network):
        raise DeltaError(f"{model} has no head for {task.kind} but a random one, so the base alone says nothing; "
                         "give --delta")  # fmt: skip
    return None, network, processor


def open_delta(
    delta: str, model: str | None, dtype: str | None = None, quantize: str | None = None
) -> tuple[sm.Delta, PreTrainedModel, Processor]:
    """A delta with its base, that is where the delta says unless `model` is given, and its processor.

    With a `quantize` that is not the training's, the delta is put on that base, and a warning says so.
    """
    trained = sm.Delta.load(delta)
    name = model or trained.base.name
    if not name:
        raise DeltaError("the delta does not say where its base is; give --model")
    asked = trained.base.quantised if quantize is None else quantize
    found = sm.load(name, delta=trained, dtype=dtype or trained.base.dtype, quantize=asked)
    other = asked.removeprefix("none") != trained.base.quantised
    return sm.rebase(trained, found[0]) if other else trained, *found
