"""Raw splits from a built-in name, a file, a folder of split files, or the hub."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetsError

from smidgen.common.errors import DataError, nearest
from smidgen.data import conll, delimited_text
from smidgen.data.bbc_news import BBC, _bbc

SPLITS = ("train", "validation", "test")


FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".conll": "tagged",
    ".conllu": "tagged",
    ".iob": "tagged",
    ".iob2": "tagged",
    ".bio": "tagged",
}


_SAME = {
    "train": "train training train_full",
    "validation": "validation valid val dev validation_matched",
    "test": "test test_labeled test_labelled test_matched",
}


_ALIASES = {alias: split for split, names in _SAME.items() for alias in names.split()}


_GLUE = {"glue": "nyu-mll/glue", "super_glue": "aps/super_glue"}


_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class Raw:
    """Splits as they were read.

    Attributes:
        name: short name of the source.
        splits: among train, validation, test.
        notes: what was left out -> why.
        prose: the rows are successive paragraphs of running text.
    """

    name: str
    splits: dict[str, Dataset]
    notes: dict[str, str] = field(default_factory=dict)
    prose: bool = False


def read_splits(source: str, *, tagged: bool = False) -> Raw:
    """Read a source. A built-in name comes first, then an existing path, then a hub id.

    Args:
        tagged: read a .txt file as words with tags in any case.

    Raises:
        DataError: there is no such source, or it cannot be read, or it is empty.
    """
    path = Path(source).expanduser()
    if source == BBC:
        return Raw(BBC, _bbc())
    if path.is_dir():
        return _folder(path, tagged)
    if path.exists():
        return _files(path.stem, {"train": [path]}, tagged)
    if source.startswith((".", "/", "~")) or path.suffix.lower() in FORMATS:
        near = nearest(path.name, _neighbours(path))
        raise DataError(f"data file not found: {source}{near}")
    return _hub(source)


def split_called(name: str) -> str | None:
    """The split of that name, or one of its usual other names; None if there is none."""
    return _ALIASES.get(name.lower().replace("-", "_"))


def _neighbours(path: Path) -> list[str]:
    there = path.parent.iterdir() if path.parent.is_dir() else ()
    return [p.name for p in there if (p.is_dir() and not path.suffix) or p.suffix.lower() in FORMATS]


def _folder(path: Path, tagged: bool) -> Raw:
    """The splits of a folder, whose files are named after them; a split may lie in several shards."""
    found: dict[str, list[Path]] = defaultdict(list)
    notes = {}
    for file in sorted(p for p in path.iterdir() if p.suffix.lower() in FORMATS):
        split = split_called(_SHARD.sub("", file.stem))
        if split is None:
            notes[file.name] = "not the name of a split"
        else:
            found[split].append(file)
    if not found:
        there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise DataError(f"no split files in {path}; expected train, validation, test {' '.join(FORMATS)} "
                        f"and found {there}")  # fmt: skip
    raw = _files(path.name, {s: found[s] for s in SPLITS if s in found}, tagged)
    return replace(raw, notes=notes | raw.notes)


def read_rows(path: Path) -> tuple[Dataset, str]:
    """The rows of one file as they are, the cells of .csv and .tsv as text, and a note on how they were read.

    Raises:
        DataError: it cannot be read, is empty, or is running text.
    """
    part = _file([path])
    if part.prose:
        raise DataError(f"{path} is running text, which has no rows")
    if part.table is not None:
        return Dataset.from_dict(part.table.columns), part.note
    assert part.rows is not None
    return part.rows, part.note


def _files(name: str, found: dict[str, list[Path]], tagged: bool) -> Raw:
    """Files of each split as rows. Cells of .csv and .tsv get their types here, from all splits at once."""
    parts = {split: _file(paths, tagged) for split, paths in found.items()}
    notes = {found[split][0].name: part.note for split, part in parts.items() if part.note}
    if len({part.prose for part in parts.values()}) > 1:
        raise DataError(f"{name} mixes .txt files of running text with files of rows; keep one of the two")
    typed = delimited_text.typed({split: part.table for split, part in parts.items() if part.table is not None})
    splits = {split: typed[split] if part.rows is None else part.rows for split, part in parts.items()}
    return Raw(name, splits, notes, prose=any(part.prose for part in parts.values()))


@dataclass(frozen=True)
class _Part:
    """One split as it was read: rows, or cells that have no types yet."""

    rows: Dataset | None = None
    table: delimited_text.DelimitedTable | None = None
    note: str = ""
    prose: bool = False


def _file(paths: Sequence[Path], tagged: bool = False) -> _Part:
    """One file, or the shards of one. Nothing is left in a cache: the rows are in memory."""
    first, suffix = paths[0], paths[0].suffix.lower()
    if suffix not in FORMATS:
        raise DataError(f"cannot read {first}: unknown type {suffix or 'without extension'!r}; "
                        f"known are {' '.join(FORMATS)}")  # fmt: skip
    if len(paths) > 1 and not all(_SHARD.search(p.stem) and p.suffix == first.suffix for p in paths):
        raise DataError(f"{' and '.join(p.name for p in paths)} are the same split of {first.parent}; keep one")
    if suffix == ".parquet":
        return _Part(_loaded(paths, "parquet"))
    texts = [decode(path) for path in paths]
    form = FORMATS[suffix]
    if form in ("csv", "text") and ((tagged and form == "text") or all(map(conll.is_tagged, texts))):
        form = "tagged"
    if form == "tagged":
        sentences = [conll.tagged(text, str(path)) for text, path in zip(texts, paths, strict=True)]
        note = "" if FORMATS[suffix] == "tagged" else "is read as a word and its tags on each line"
        return _Part(_concatenated(sentences, paths), note=note)
    if form == "text":
        return _Part(Dataset.from_dict({"text": paragraphs("".join(texts))}), prose=True)
    if form == "csv":
        table = _table(paths, texts)
        return _Part(table=table, note=table.note)
    return _Part(_loaded(paths, form))


def _table(paths: Sequence[Path], texts: Sequence[str]) -> delimited_text.DelimitedTable:
    expected = "\t" if paths[0].suffix.lower() == ".tsv" else ","
    parsed = [
        delimited_text.parse_delimited(text, str(path), expected) for text, path in zip(texts, paths, strict=True)
    ]
    table = delimited_text.joined(parsed, [str(path) for path in paths])
    if not any(table.columns.values()):
        raise DataError(f"{paths[0]} is empty: no rows")
    return table


def _concatenated(parts: Sequence[Dataset], paths: Sequence[Path]) -> Dataset:
    for part, path in zip(parts, paths, strict=True):
        if part.column_names != parts[0].column_names:
            counts = f"{len(part.column_names)} columns, {paths[0]} {len(parts[0].column_names)}"
            raise DataError(f"{path} has {counts}; shards of a split must have the same")
    return datasets.concatenate_datasets(list(parts))


def _loaded(paths: Sequence[Path], form: str) -> Dataset:
    """Rows of .json, .jsonl and .parquet files."""
    first = paths[0]
    with quiet(), TemporaryDirectory() as cache:
        try:
            rows = datasets.load_dataset(
                form, data_files=[_literal(p) for p in paths], split="train", cache_dir=cache, keep_in_memory=True
            )
        except (OSError, ValueError, DatasetsError) as error:
            reason = _reason(error)
            raise DataError(
                f"{first} is empty: no rows" if "no data!" in reason else f"cannot read {first}: {reason}"
            ) from error
    if not len(rows):
        raise DataError(f"{first} is empty: no rows")
    return rows


def _literal(path: Path) -> str:
    """datasets takes data files as glob patterns."""
    return re.sub(r"([*?\[])", r"[\1]", str(path.resolve()))


def decode(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        DataError: it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = f"byte {error.object[error.start]:#04x} at {error.start} is not UTF-8 (line {line})"
        raise DataError(f"cannot decode {path}: {byte}; save the file as UTF-8") from error
    if not text.strip():
        raise DataError(f"{path} is empty")
    return text


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return " ".join(str(cause).split())[:200] or type(cause).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no log lines from datasets: errors are told by the caller."""
    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def paragraphs(text: str) -> list[str]:
    """Pieces that give the text when joined: up to each blank line, or lines if there are few of these."""
    pieces = [piece for piece in re.findall(r".*?(?:\n[^\S\n]*\n|\Z)", text, re.S) if piece]
    return pieces if len(pieces) >= 20 else text.splitlines(keepends=True)


def _hub(source: str) -> Raw:
    """The splits of a data set of the Hugging Face hub, `owner/name` or `owner/name:config`."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        raise DataError(f"unknown data {source!r}; built in is {BBC!r}, else give an existing file or "
                        f"folder, or a hub id as owner/name:config{nearest(source, [BBC])}")  # fmt: skip
    name, _, config = source.partition(":")
    owner, _, rest = name.partition("/")
    if owner in _GLUE:
        name, config = _GLUE[owner], rest
    try:
        loaded = datasets.load_dataset(name, config or None)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(f"cannot load {source!r} from the hub: {_reason(error)}") from error
    splits = {_ALIASES[key]: rows for key, rows in loaded.items() if key in _ALIASES}
    notes = {key: "not the name of a split" for key in loaded if key not in _ALIASES}
    if not splits:
        raise DataError(f"{source!r} has none of the splits train, validation, test; found {', '.join(loaded)}")
    return Raw(source, {s: splits[s] for s in SPLITS if s in splits}, notes)
