"""Arguments of Python functions in a message, spelled as the options of the command that is running.

Errors are written for the Python API (`kind='regression'`, `label=`), which is what the command line calls. Fields of
methods (`LoRA(rank=8)`) are spelled the same in both, so what stands in brackets behind a name is left alone.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

# Kinds of tasks; they stand here for `--task-kind`, in a file that is quick to import.
KINDS = (
    "classification",
    "regression",
    "tokens",
    "causal-lm",
    "chat",
    "image-classification",
    "audio-classification",
    "pairs",
    "retrieval",
    "masked-lm",
    "seq2seq",
    "span-qa",
)
# Ways to store the linear maps of a base, for `--quantize`; `smidgen.inference.quantising` says what each is.
SCHEME_NAMES = ("none", "nf4", "nf4-double", "fp4", "fp4-double", "int8", "torchao-int8", "torchao-int4")
# Options of some command that are called as a field of a method or a selection is: messages mean the field.
FIELDS = ("examples", "target")
_ARGUMENT = re.compile(r"(?<![\w.-])([a-z][a-z_]*)=('[^']*'|\"[^\"]*\"|[\[(][^\])]*[\])]|[\w.+-]*[\w+-])?")
_BARE = re.compile(r"(?<![\w.'\"/=-])[a-z]+_[a-z_]+(?![\w.'\"/=(-])")  # an underscore tells an argument from a word
_OTHER = {"task": "data"}
_REMARK = re.compile(r" \(or (?:pass )?([a-z_]+)=[^()]*\)")

Options = Mapping[str, tuple[str, str | None]]
NONE: Options = MappingProxyType({})
_OPTIONS: ContextVar[Options] = ContextVar("options", default=NONE)


@contextmanager
def as_options(options: Options) -> Iterator[None]:
    """Spell messages for a command. options: parameter -> its option and, of a switch, the option for False."""
    token = _OPTIONS.set(options)
    try:
        yield
    finally:
        _OPTIONS.reset(token)


def spelled(text: str) -> str:
    """A message with `name=value` as `--name value`, where the command that is running has such an option.

    A remark "(or name=value ...)" on an argument that it has not is left out.
    """
    options = _OPTIONS.get()
    if not options:
        return text
    text = _REMARK.sub(lambda found: found[0] if _option(found[1], "", options) else "", text)

    def option(found: re.Match[str]) -> str:
        value = (found[2] or "").strip("'\"").removeprefix("torch.")
        names = _option(found[1], value, options)
        if names is None or _in_a_call(text, found.start()):
            return found[0]
        if value == "None":
            return f"no {names[0]}"
        if value in ("True", "False"):
            return names[0] if value == "True" else names[1] or f"no {names[0]}"
        items = value.strip("[]()").split(",") if value[:1] in ("[", "(") else [value]  # which are given one by one
        each = [shlex.quote(item.strip(" '\"")) if item else "" for item in items]
        return " ".join(f"{names[0]} {item}".rstrip() for item in each)

    def bare(found: re.Match[str]) -> str:
        names = _option(found[0], "", options)
        return found[0] if names is None or _in_a_call(found.string, found.start()) else names[0]

    return _BARE.sub(bare, _ARGUMENT.sub(option, text))


def _option(name: str, value: str, options: Options) -> tuple[str, str | None] | None:
    if name == "kind" and value not in KINDS:  # of Fisher information: an option of the command that has two kinds
        return options.get(name) if "task_kind" in options else None
    if f"task_{name}" in options:
        return options[f"task_{name}"]
    name = _OTHER.get(name, name)
    return options.get(name) or options.get(name.removesuffix("s"))  # seeds=(0, 1) is --seed 0 --seed 1


def _in_a_call(text: str, end: int) -> bool:
    """Whether a place is within brackets that stand behind a name."""
    calls = list[bool]()
    for at, character in enumerate(text[:end]):
        if character == "(":
            calls.append(at > 0 and (text[at - 1].isalnum() or text[at - 1] == "_"))
        elif character == ")" and calls:
            calls.pop()
    return any(calls)
