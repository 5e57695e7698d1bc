"""Files for tagging as in CoNLL's shared tasks: a word and its tags on a line, a blank line behind each sentence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from datasets import Dataset

from smidgen.common.errors import DataError

WORDS, TAGS = "tokens", "tags"
DOCUMENT = "-DOCSTART-"
UNIVERSAL = ("id", WORDS, "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")  # CoNLL-U's ten
_TAG = re.compile(r"O|[BIESLUM]-\S+").fullmatch
_PLACE = re.compile(r"\d+(?:[-.]\d+)?").fullmatch  # a word's number in CoNLL-U, "3-4" or "5.1" for what is no word

_HEAD = 10_000  # characters that rule most other texts out

Line = tuple[int, list[str]]


def is_tagged(text: str) -> bool:
    """Whether text is such a file without doubt: lines of one width that end in O, B-type, I-type and the like, and
    sentences apart."""
    head = text[:_HEAD] if len(text) <= _HEAD else text[: text.rfind("\n", 0, _HEAD)]
    if not _ends_in_tags(_sentences(head)):
        return False
    sentences = _sentences(text)
    apart = len(sentences) > 1 or DOCUMENT in text
    return apart and _ends_in_tags(sentences) and any(fields[-1] != "O" for some in sentences for _, fields in some)


def _ends_in_tags(sentences: Sequence[Sequence[Line]]) -> bool:
    lines = [fields for sentence in sentences for _, fields in sentence]
    widths = {len(fields) for fields in lines}
    return len(widths) == 1 and widths.pop() > 1 and all(_TAG(fields[-1]) for fields in lines)


def tagged(text: str, name: str) -> Dataset:
    """Sentences as rows of lists: "tokens", "tags" (the last column), and what is between as "column_2" and so on.

    Columns are parted by tabs, or else by spaces. Lines of -DOCSTART- and comments are left out. Where the first column
    counts the words of each sentence, the words are in the second; ten such columns have the names of CoNLL-U.

    Raises:
        DataError: a line, which the message names, has another number of columns than the others, or only one.
    """
    sentences = _sentences(text)
    lines = [line for sentence in sentences for line in sentence]
    if not lines:
        raise DataError(f"{name} is empty: no sentences")
    width = Counter(len(fields) for _, fields in lines).most_common(1)[0][0]
    for number, fields in lines:
        if len(fields) != width or width < 2:
            columns = f"{len(fields)} column{'s' * (len(fields) != 1)}"
            other = f"most lines {width}" if len(fields) != width else "a word and its tag need two"
            raise DataError(f"{name} line {number} has {columns}, {other}: {' '.join(fields)[:60]}")
    names = _names(sentences, width)
    rows = [[fields for _, fields in sentence if _is_word(fields, names)] for sentence in sentences]
    return Dataset.from_dict({column: [[f[i] for f in row] for row in rows if row] for i, column in enumerate(names)})


def _names(sentences: Sequence[Sequence[Line]], width: int) -> list[str]:
    counted = all(_PLACE(fields[0]) for sentence in sentences for _, fields in sentence) and all(
        int(re.split("[-.]", sentence[0][1][0])[0]) <= 1 for sentence in sentences
    )
    if counted and width == len(UNIVERSAL):
        return list(UNIVERSAL)
    first = ["id", WORDS] if counted and width > 2 else [WORDS]
    return [*first, *(f"column_{i + 1}" for i in range(len(first), width - 1)), TAGS]


def _is_word(fields: Sequence[str], names: Sequence[str]) -> bool:
    return names[0] != "id" or fields[0].isdecimal()


def _sentences(text: str) -> list[list[Line]]:
    """(line number, columns) of each line, by sentence."""
    lines = [line.strip(" \t\r") for line in text.split("\n")]  # str.splitlines would also part at a word like U+0085
    part = re.compile("\t" if _by_tabs(lines) else "[ \t]+").split
    numbered = [(i, part(line) if line else []) for i, line in enumerate(lines, 1)]
    kept = [line for line in numbered if not line[1] or not line[1][0].startswith(DOCUMENT)]
    groups = [list(some) for full, some in groupby(kept, key=lambda line: bool(line[1])) if full]
    width = Counter(len(fields) for some in groups for _, fields in some).most_common(1)
    always = all(some[0][1][0].startswith("#") for some in groups)
    found = [list(_without_comments(some, width[0][0], always)) for some in groups]
    return [sentence for sentence in found if sentence]


def _by_tabs(lines: Sequence[str]) -> bool:
    full = [line for line in lines if line and not line.startswith(("#", DOCUMENT))]
    return bool(full) and all("\t" in line for line in full)


def _without_comments(lines: Sequence[Line], width: int, always: bool) -> Iterator[Line]:
    """A comment begins with "#" before the first word, and either so does every sentence, or it has not as many columns
    as other lines, which the word "#" would have."""
    before = True
    for i, (number, fields) in enumerate(lines):
        before = before and fields[0].startswith("#") and (len(fields) != width or (always and i == 0))
        if not before:
            yield number, fields
