"""Conversations as data sets write them, read into one form: lists of {role, content}, checked turn by turn.

| columns | what they are |
|---|---|
| messages | turns of {role, content}, as of OpenAI |
| conversations | turns of {from, value}, as of ShareGPT; human is the user, gpt the assistant |
| instruction, input, output | Alpaca's; the input, where there is one, stands below the instruction |
| instruction, context, response | Dolly's, read alike |
| instruction, instances | seed tasks of Self-Instruct: each instance is a conversation |
| prompt, completion | what the user and what the assistant says, texts or lists of turns |
| prompt, response; question, answer | read alike |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from datasets import Dataset

from smidgen.common.errors import DataError, nearest
from smidgen.data.columns import COUNTED, and_more, only_column
from smidgen.data.encoded import Column

Turn = dict[str, object]
CLAIMED = (
    ("conversations",), ("instruction", "instances"), ("instruction", "input", "output"), ("instruction", "output"),
    ("instruction", "context", "response"), ("instruction", "response"),
)  # fmt: skip
FORMS = (("messages",), *CLAIMED, ("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
OTHER_NAMES = {"human": "user", "gpt": "assistant"}  # ShareGPT's
LEADING = ("system", "developer")
_ROLE, _CONTENT = ("role", "from"), ("content", "value")


def fitting_forms(there: Sequence[str], forms: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Those of some forms whose columns are all there; one that is part of another gives way."""
    found = [form for form in forms if set(form) <= set(there)]
    return [form for form in found if not any(set(form) < set(other) for other in found)]


def chat_columns(rows: Dataset, text: Sequence[str] | None) -> tuple[str, ...]:
    """The columns that hold conversations: what is given, or the one form whose columns are there.

    Raises:
        DataError: none, or more than one, could be meant; more than three are given.
    """
    there = rows.column_names
    if text is not None and len(text) > 3:
        raise DataError(f"chat takes one to three columns, found {len(text)}: {', '.join(text)}")
    return tuple(text) if text else only_column(fitting_forms(there, FORMS), there, "text")


def read_conversations(rows: Dataset, names: Sequence[str], split: str) -> list[list[Turn]]:
    """The conversations of a split.

    Raises:
        DataError: a column is missing, or a row holds no conversation: a role is missing or unknown, a turn empty, a
            system message the second one.
    """
    for name in names:
        if name not in rows.column_names:
            raise DataError(f"{split} has no column {name!r}; its columns are {', '.join(rows.column_names)}")
    found, wrong = list[list[Turn]](), list[DataError]()
    for number, cells in enumerate(zip(*(rows[name][:] for name in names), strict=True)):
        try:
            found += _conversations(cells, f"{split} row {number}")
        except DataError as error:
            wrong.append(error)
    if wrong:
        raise DataError(f"{wrong[0]}{_more(len(wrong))}{COUNTED}")
    return found


def _more(count: int) -> str:
    more = and_more(count)
    return f";{more} such row{'s' * (count > 2)}" if more else ""


def _conversations(cells: Sequence[object], where: str) -> Iterator[list[Turn]]:
    """What the cells of one row hold, told from their number and type."""
    first, *others = cells
    if not others:
        yield _turns(first, where)
    elif len(others) == 2:
        yield _answered(_below(first, others[0]), others[1], where)
    elif isinstance(others[0], list) and any(isinstance(each, Mapping) and "output" in each for each in others[0]):
        for instance in cast("list[Mapping[str, object]]", others[0]):
            yield _answered(_below(first, instance.get("input")), instance["output"], where)
    elif isinstance(others[0], list):
        asked = first if isinstance(first, list) else [{"role": "user", "content": first}]
        yield _turns([*asked, *others[0]], where)
    else:
        yield _answered(first, others[0], where)


def _below(instruction: object, given: object) -> object:
    """An instruction with what it is about, which may be left out."""
    return f"{instruction}\n\n{given}" if isinstance(given, str) and given.strip() else instruction


def _answered(asked: object, said: object, where: str) -> list[Turn]:
    return _turns([{"role": "user", "content": asked}, {"role": "assistant", "content": said}], where)


def _turns(given: object, where: str) -> list[Turn]:
    """A list of turns with known roles and texts. Raises DataError, naming the turn, where one is not."""
    if not isinstance(given, list) or not given:
        what = "is empty" if given in ([], None, "") else f"is {str(given)[:60]!r}"
        raise DataError(f"{where}: the conversation {what}; expected a list of turns, {{role, content}} each")
    turns = [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(given)]
    leading = [number for number, turn in enumerate(turns) if turn["role"] in LEADING]
    if len(leading) > 1:
        raise DataError(f"{where}, turn {leading[1]}: a second system message, after that of turn {leading[0]}; "
                        "join the two")  # fmt: skip
    return turns


def _turn(given: object, where: str) -> Turn:
    """One turn with a known role and a text. Raises DataError where it has none."""
    if not isinstance(given, Mapping):
        raise DataError(f"{where} is {str(given)[:60]!r}, not {{role, content}}")
    rest = {key: value for key, value in given.items() if value is not None}  # None: a field of other turns
    role = next((rest.pop(key) for key in _ROLE if key in rest), None)
    if role is None:
        raise DataError(f"{where} has no role; its fields are {', '.join(map(str, rest)) or 'all empty'}")
    known = OTHER_NAMES.get(str(role), role)
    if known not in ROLES:
        names = (*ROLES, *OTHER_NAMES)
        raise DataError(f"{where} has the unknown role {role!r}{nearest(str(role), names)}; known: {', '.join(names)}")
    said = _text(next((rest.pop(key) for key in _CONTENT if key in rest), ""), f"{where} ({role})")
    if not said.strip() and not rest.get("tool_calls"):
        raise DataError(f"{where} ({role}) is empty; fill the turn, or drop the row")
    return {"role": known, "content": said, **rest}


def _text(content: object, where: str) -> str:
    """A turn's text; of a list of parts, that of all of them."""
    if isinstance(content, str):
        return content
    parts: Column = content if isinstance(content, list) else [content]
    found = ""
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise DataError(f"{where} holds {str(part)[:60]!r}; expected text")
        found += text
    return found
