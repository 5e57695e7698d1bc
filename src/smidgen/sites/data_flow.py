"""Which children of a module each of its outputs is computed with, read from the code of its class.

Assignments are followed in the order of the text, names only ever gain children, and a helper counts with all that it
mentions: what is said to have no part in an output has none. Where the code does anything else, nothing is said.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# of self: ways to a child that its name does not tell
HIDDEN = {"_modules", "modules", "named_modules", "children", "named_children", "get_submodule", "base_model"}


EMBEDDINGS = "get_input_embeddings"  # that of transformers, which looks at names, reads no more than the embeddings


class UnclearError(Exception):
    """The code does something that is not followed here."""


@cache
def output_fields(cls: type) -> dict[str, frozenset[str]] | None:
    """Field of what the class's forward gives -> attributes of self that it is computed with, in the class's order of
    fields; None where the code does not tell."""
    try:
        check_plain(cls)
        forward = definitions(cls, "forward")[0]
        flow = _Flow(cls)
        flow.run(forward.body)
        return _ordered(flow)
    except (UnclearError, IndexError):
        return None


def definitions(cls: type, name: str) -> list[ast.FunctionDef]:
    """A function of a class and those of the same name that it overrides, parsed."""
    found = []
    for base in cls.__mro__:
        if name == EMBEDDINGS and issubclass(PreTrainedModel, base):
            break
        function = vars(base).get(name)
        if isinstance(function, property) and base is not PreTrainedModel:
            function = function.fget
        function = inspect.unwrap(function) if callable(function) else function
        if base is not nn.Module and isinstance(function, FunctionType):
            found.append(_parsed(function))
    return found


@cache
def reachable(cls: type, start: str = "forward") -> tuple[ast.FunctionDef, ...]:
    """What a function of a class may run of the class's own functions, itself first."""
    names, found = [start], []
    for name in names:
        for tree in definitions(cls, name):
            found.append(tree)
            names += [n for n in _attributes(tree) if n not in names and _is_code(cls, n)]
    return tuple(found)


def check_plain(cls: type) -> None:
    """Raises UnclearError if the class's forward may reach a child by another way than its name."""
    for tree in reachable(cls):
        owners = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id == "self" and id(node) not in owners:
                raise UnclearError(cls)
        if HIDDEN & set(_attributes(tree)):
            raise UnclearError(cls)


@cache
def only_called(cls: type, name: str) -> bool:
    """Whether the code of a class does nothing with a child but call it, if that."""
    try:
        check_plain(cls)
        trees = reachable(cls)
    except UnclearError:
        return False
    calls = {id(node.func) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return all(id(node) in calls for tree in trees for node in ast.walk(tree) if own(node) == name)


def own(node: ast.AST) -> str:
    """The name in `self.name`, else ""."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return ""


def _attributes(tree: ast.AST) -> Iterator[str]:
    """Names of what is asked of self, or of super()."""
    for node in ast.walk(tree):
        if name := own(node):
            yield name
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call):
            called = node.value.func
            if isinstance(called, ast.Name) and called.id == "super":
                yield node.attr


def _is_code(cls: type, name: str) -> bool:
    found = inspect.getattr_static(cls, name, None)
    return isinstance(found, property) or callable(found)


@cache
def _parsed(function: FunctionType) -> ast.FunctionDef:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError) as error:
        raise UnclearError(function) from error
    if not isinstance(tree, ast.FunctionDef):
        raise UnclearError(function)
    return tree


class _Flow:
    """The children behind each name of a function, statement by statement."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.names: dict[str, set[str]] = {}
        self.given: dict[str, set[str]] = {}
        self.made = ""

    def run(self, body: list[ast.stmt]) -> None:
        for statement in body:
            if isinstance(statement, ast.For | ast.While):
                self._loop(statement)
            elif isinstance(statement, ast.If | ast.With | ast.Try):
                for part in (*_bodies(statement),):
                    self.run(part)
            elif isinstance(statement, ast.Return):
                self._give(statement.value)
            else:
                self._simple(statement)

    def _loop(self, statement: ast.For | ast.While) -> None:
        for _ in range(2):  # what the end of the body makes comes in at its start
            if isinstance(statement, ast.For):
                self._add(statement.target, self.behind(statement.iter))
            self.run(statement.body)
        self.run(statement.orelse)

    def _simple(self, statement: ast.stmt) -> None:
        """What a statement without a body writes into which names; raises UnclearError for one that is not known."""
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                self._add(target, self.behind(statement.value))
        elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
            self._add(statement.target, self.behind(statement.value) if statement.value else set())
        elif isinstance(statement, ast.Expr):
            # what is called may write into each name that it is given: append, add_, update
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and node.id != "self":
                    self.names.setdefault(node.id, set()).update(self.behind(statement))
        elif not isinstance(statement, ast.Raise | ast.Assert | ast.Pass | ast.Break | ast.Continue | ast.Delete):
            raise UnclearError(ast.dump(statement)[:80])

    def _add(self, target: ast.AST, children: set[str]) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                self.names.setdefault(node.id, set()).update(children)

    def behind(self, node: ast.AST) -> set[str]:
        """The children that an expression is computed with."""
        found: set[str] = set()
        for part in ast.walk(node):
            if isinstance(part, ast.Lambda | ast.NamedExpr):
                raise UnclearError(ast.dump(part)[:80])
            if isinstance(part, ast.Name):
                found |= self.names.get(part.id, set())
            if name := own(part):
                found.add(name)
                if name == EMBEDDINGS and not definitions(self.cls, name):
                    raise UnclearError(name)
                if _is_code(self.cls, name):
                    found.update(n for tree in reachable(self.cls, name) for n in _attributes(tree))
        return found

    def _give(self, value: ast.AST | None) -> None:
        if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Name):
            return  # the same as a tuple
        if value.args or any(word.arg is None for word in value.keywords) or self.made not in ("", value.func.id):
            raise UnclearError(ast.dump(value)[:80])
        self.made = value.func.id
        for word in value.keywords:
            self.given.setdefault(str(word.arg), set()).update(self.behind(word.value))


def _bodies(statement: ast.If | ast.With | ast.Try) -> Iterator[list[ast.stmt]]:
    yield statement.body
    yield getattr(statement, "orelse", [])
    for handler in getattr(statement, "handlers", []):
        yield handler.body
    yield getattr(statement, "finalbody", [])


def _ordered(flow: _Flow) -> dict[str, frozenset[str]] | None:
    """The fields in the order of the class of outputs."""
    forward: Any = inspect.unwrap(getattr(flow.cls, "forward"))  # noqa: B009
    made: object = forward.__globals__.get(flow.made)
    if not (isinstance(made, type) and is_dataclass(made)):
        return None
    return {f.name: frozenset(flow.given[f.name]) for f in fields(made) if f.name in flow.given}
