"""Recipes: sums of terms with one spelling in Python, on the command line, in file names and in saved files.

A term is a frozen dataclass; defining the class registers its name. `parse` reads the spelling with `ast` and
accepts registered calls, literals and `+` only: nothing is ever evaluated.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from smidgen.errors import RecipeError, nearest


class Term:
    """One registered part of a recipe. Subclasses are frozen dataclasses with a docstring."""

    registry: ClassVar[dict[str, type[Term]]] = {}

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if abstract:
            return
        known = Term.registry.get(cls.__name__)
        if known is not None and known.__module__ != cls.__module__:
            raise TypeError(f"two recipe terms are named {cls.__name__}: one in {known.__module__}")
        if not (cls.__dict__.get("__doc__") or "").strip():
            raise TypeError(f"{cls.__name__} has no docstring: state paper, formula and shapes")
        Term.registry[cls.__name__] = cls

    def __add__(self, other: Term | Recipe) -> Recipe:
        return Recipe((self,)) + other

    def __str__(self) -> str:
        """The spelling, with fields at their defaults left out."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in fields if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(shown)})"

    def to_json(self) -> dict[str, Any]:
        """Every field, so that a changed default never changes a saved file."""
        return {"name": type(self).__name__, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Term:
        """The inverse of `to_json`. Raises RecipeError on an unknown name or a wrong set of fields."""
        fields = {k: _frozen(v) for k, v in data.items() if k != "name"}
        term = build(str(data.get("name")), (), fields)
        missing = {f.name for f in dataclasses.fields(term)} - set(fields)  # type: ignore[arg-type]
        if missing:
            raise RecipeError(f"saved {data['name']} lacks the field(s) {', '.join(sorted(missing))}")
        return term


@dataclass(frozen=True)
class Recipe:
    """A sum of terms, applied left to right.

    Raises:
        RecipeError: it is empty.
    """

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise RecipeError("a recipe needs at least one method, for example LN()")

    def __add__(self, other: Term | Recipe) -> Recipe:
        if not isinstance(other, Term | Recipe):
            return NotImplemented
        return Recipe(self.terms + as_recipe(other).terms)

    def __iter__(self) -> Iterator[Term]:
        return iter(self.terms)

    def __len__(self) -> int:
        return len(self.terms)

    def __str__(self) -> str:
        return " + ".join(str(term) for term in self.terms)

    def to_json(self) -> list[dict[str, Any]]:
        """A list of terms, every field of each spelled out."""
        return [term.to_json() for term in self.terms]

    @classmethod
    def from_json(cls, data: Sequence[Mapping[str, Any]]) -> Self:
        """The inverse of `to_json`."""
        return cls(tuple(Term.from_json(entry) for entry in data))


def as_recipe(value: str | Term | Recipe) -> Recipe:
    """A spelling, a single term or a recipe, as a recipe."""
    if isinstance(value, Recipe):
        return value
    if isinstance(value, Term):
        return Recipe((value,))
    if isinstance(value, str):
        return parse(value)
    raise RecipeError(f"a recipe is a string, a method or a sum of methods, not {type(value).__name__}")


def parse(text: str) -> Recipe:
    """Read a spelling such as ``LN() + LoRA(rank=8)``.

    Raises:
        RecipeError: the text is not a sum of registered calls with literal arguments; names the nearest one.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise RecipeError(f"cannot read the recipe {text!r}; write it like 'LN() + LoRA(rank=8)'") from None
    return Recipe(tuple(_terms(tree.body)))


def registry() -> dict[str, type[Term]]:
    """All terms by name; the package's own methods are loaded when first asked for."""
    importlib.import_module("smidgen.methods")
    return Term.registry


def build(name: str, args: tuple[Any, ...], fields: Mapping[str, Any]) -> Term:
    """Make the registered term `name`; unknown names and fields are errors that name the nearest."""
    known = registry()
    cls = known.get(name)
    if cls is None:
        names = ", ".join(sorted(known))
        raise RecipeError(f"no method is called {name!r}{nearest(name, known)}; known: {names}")
    allowed = list(inspect.signature(cls).parameters)
    for field in fields:
        if field not in allowed:
            has = ", ".join(allowed) or "no fields"
            raise RecipeError(f"{name} has no field {field!r}{nearest(field, allowed)}; it has: {has}")
    try:
        return cls(*args, **fields)
    except TypeError as error:
        raise RecipeError(f"{name}: {error}") from None


def _terms(node: ast.expr) -> Iterator[Term]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from _terms(node.left)
        yield from _terms(node.right)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if any(keyword.arg is None for keyword in node.keywords):
            raise RecipeError(f"'**' is not understood in {ast.unparse(node)!r}")
        args = tuple(_literal(value) for value in node.args)
        yield build(node.func.id, args, {str(k.arg): _literal(k.value) for k in node.keywords})
    elif isinstance(node, ast.Name) and node.id in registry():
        raise RecipeError(f"{node.id} needs brackets: write {node.id}()")
    elif isinstance(node, ast.Name):
        build(node.id, (), {})  # raises, naming the nearest method
    else:
        raise RecipeError(f"{ast.unparse(node)!r} is not understood in a recipe; only + between methods is")


def _literal(node: ast.expr) -> Any:
    try:
        return _frozen(ast.literal_eval(node))
    except (ValueError, TypeError, SyntaxError):
        raise RecipeError(f"{ast.unparse(node)!r} is not a number, a string, a tuple, True, False or None") from None


def _frozen(value: Any) -> Any:
    """Lists become tuples, so that terms stay hashable and JSON round trips."""
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value
