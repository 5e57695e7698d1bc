"""What results look like to a person: rich tables on stdout, notes and errors as single lines on stderr."""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from smidgen.common.argument_spelling import spelled
from smidgen.common.byte_sizes import format_bytes
from smidgen.common.json_numbers import plain

if TYPE_CHECKING:
    from smidgen.cli.demonstration import Demonstration
    from smidgen.data.task import Task
    from smidgen.delta.delta import Delta
    from smidgen.inference.evaluation import Scores
    from smidgen.inference.exporters.exporting import Exported
    from smidgen.inference.prediction import Prediction

WIDTH = 120  # of output that goes to a file or a pipe
PLAN = ("plan", "--model", "minilm", "--recipe", "LN() + LoRA(rank=8)")
TUNE = ("tune", "--model", "minilm", "--data", "your.csv", "--out", "run")


def show(data: Mapping[str, object], view: RenderableType, as_json: bool) -> None:
    """The one result of a command on stdout: a JSON object, or what a person reads."""
    if as_json:
        print(json.dumps(plain(data), ensure_ascii=False))
    else:
        Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False).print(view, crop=False)


def note(text: object) -> None:
    """One line on stderr, above a bar that may be there."""
    line = spelled(" ".join(str(text).split()))
    print(typer.style(line, dim=True) if sys.stderr.isatty() else line, file=sys.stderr)


def error(text: object) -> None:
    """One line on stderr that begins with `error:`."""
    typer.echo(f"{typer.style('error:', fg='red')} {spelled(' '.join(str(text).split()))}", err=True)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Warnings meant for a user become one line each; those for developers are left out."""

    def line(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        note(f"note: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = line
        yield


def number(value: object) -> str:
    """A score or a count."""
    return str(value) if not isinstance(value, int | float) else f"{value:{',' if type(value) is int else '.4f'}}"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A plain table; columns whose name begins with `#` are numbers, aligned to the right."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        result.add_column(name.lstrip("#"), justify="right" if name[0] == "#" else "left", overflow="fold")
    for row in rows:
        result.add_row(*(Text(cell if isinstance(cell, str) else number(cell)) for cell in row))
    return result


def facts(entries: Mapping[str, object]) -> Table:
    """Names and values below one another."""
    result = Table(box=None, show_header=False, pad_edge=False)
    result.add_column(style="dim", no_wrap=True)
    result.add_column(overflow="fold")
    for key, value in entries.items():
        result.add_row(key, Text(str(value)))
    return result


def described(task: Task) -> str:
    """A task in one line, with what was told from the data."""
    rows = ", ".join(f"{len(split):,} {name}" for name, split in task.splits.items())
    labels = f", {len(task.labels)} labels" if task.labels else ""
    notes = "".join(f"; {name} {why}" for name, why in task.notes.items())
    taken = ", ".join(f"{source.rows.get('train', 0):,} of {source.name}" for source in task.sources)
    mixed = f"; train is {taken}" if taken else ""
    return f"{task.name}: {task.kind} of {' and '.join(task.text)}{labels}; {rows}{mixed}{notes}"


def scores_view(values: Mapping[str, float]) -> Table:
    """Metrics of one split."""
    return table(("metric", "#value"), values.items())


def evaluated(result: Scores, what: str, data: str, split: str) -> RenderableType:
    """Metrics with where they come from."""
    title = Text(f"{what} on {data}, {split}: {len(result.references):,} examples", style="bold")
    cut = f"{result.truncated:,} examples were cut to max_length" if result.truncated else ""
    return Group(title, scores_view(result.values), Text(cut))


def tuned(delta: Delta, out: Path, task: Task, data: Sequence[str], already: bool, can_merge: bool) -> RenderableType:
    """A finished run: scores, files, what to do next. data: the options that say what `task` is."""
    done = "was already finished; this is its result" if already else "finished"
    head = f", head {delta.head_values:,}" if delta.head else ""
    held = next((name for name in ("test", "validation", "train") if name in task.splits), "test")
    split = [] if held == "test" else ["--split", held]
    merge = [("merge", "--delta", str(out), "--out", f"{out}-merged")] if can_merge else []
    pair = len(task.task_kind.asked(task.text)) == 2
    tried = ("chat", "--delta", str(out)) if task.task_kind.converses else _predict(out, pair)
    return Group(
        Text(f"{delta.recipe} {done}: {delta.trained:,} values{head}", style="bold"),
        scores_view(delta.info.get("scores", {})),
        listing(out),
        _next(("evaluate", "--delta", str(out), *data, *split), tried, *merge),
    )


def _predict(out: Path, pair: bool = False) -> tuple[str, ...]:
    return ("predict", "--delta", str(out), "--text", "a text", *(("--pair", "a second one") if pair else ()))


def _next(*commands: Sequence[str]) -> Text:
    """Commands as a shell reads them."""
    lines = "\n       ".join(shlex.join(["smidgen", *command]) for command in commands)
    return Text(f"next:  {lines}", style="dim", no_wrap=True, overflow="ignore")


def sizes(folder: Path) -> dict[str, int]:
    """File name -> bytes of a local folder, hidden ones apart."""
    return {p.name: p.stat().st_size for p in sorted(folder.glob("[!.]*")) if p.is_file()}


def listing(folder: Path) -> Table:
    """The files of a folder."""
    rows = [(name, format_bytes(count)) for name, count in sizes(folder).items()]
    return table((f"files in {folder}", "#size"), rows)


def exported(done: Exported) -> RenderableType:
    """What was exported, and the comparison that it passed."""
    return Group(Text(f"checked: {done.equality}"), listing(done.out))


def inspected(delta: Delta, folder: Path) -> RenderableType:
    """What a delta is."""
    task, settings = delta.info.get("task", {}), delta.info.get("settings", {})
    base = delta.base
    entries = {
        "base": f"{base.name or 'unnamed'} ({base.architecture}, {base.dtype})",
        "fingerprint": f"{base.content} (structure {base.structure})",
        "values": f"{delta.trained:,} trained, head {delta.head_values:,}, in {len(delta.tensors)} tensors",
        "labels": ", ".join(delta.labels[:12]) + (", ..." if len(delta.labels) > 12 else ""),
        "pooling": delta.pooling or "the class's own",
        "task": ", ".join(f"{k} {v}" for k, v in task.items()),
        "settings": ", ".join(f"{k} {v}" for k, v in settings.items() if v is not None),
    }
    parts = [facts({k: v for k, v in entries.items() if v})]
    if delta.info.get("scores"):
        parts.append(scores_view(delta.info["scores"]))
    return Group(Text(str(delta.recipe), style="bold"), *parts, listing(folder))


def predictions(rows: Sequence[Prediction]) -> RenderableType:
    """Texts with what the model says about each."""
    texts = [shorten(row.text, 70, placeholder="...") for row in rows]
    if any(row.probabilities for row in rows):
        cells = [(text, row.label, *_odds(row.probabilities)) for text, row in zip(texts, rows, strict=True)]
        return table(("text", "label", "#probability", "next"), cells)
    return table(("text", "prediction"), [(text, row.answer) for text, row in zip(texts, rows, strict=True)])


def _odds(probabilities: Mapping[str, float]) -> tuple[str, str]:
    ranked = sorted(probabilities.items(), key=lambda item: -item[1])
    second = f"{ranked[1][0]} {ranked[1][1]:.3f}" if len(ranked) > 1 else ""
    return f"{ranked[0][1]:.3f}", second


def demonstrated(result: Demonstration, out: Path) -> RenderableType:
    """The demo's comparison, its predictions and what to try next."""
    columns = ("arm", "#test accuracy", "#trained values", "#head values", "#file", "#seconds")
    arms = [
        (a.name, a.accuracy, a.trained, a.head, format_bytes(a.file_bytes), round(a.seconds or 0) or "-")
        for a in result.arms
    ]
    return Group(
        table(columns, arms),
        Text(result.remark),
        Text(f"LN()'s delta is in {out}. Read back from disk, it says:", style="bold"),
        predictions(result.predictions),
        _next(("inspect", str(out)), _predict(out), PLAN, TUNE),
    )
