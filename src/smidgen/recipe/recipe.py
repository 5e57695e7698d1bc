"""Recipes: sums of terms with one spelling in Python, on the command line, in file names and in saved files.

A term is a frozen dataclass; defining the class registers its name. `a + b` is both, `a + b | c` is both, narrowed by
c. `parse` reads the spelling with `ast` and accepts registered calls, literals, `+` and `|` only, never `eval`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import ClassVar, cast

from smidgen.common.errors import RecipeError, nearest
from smidgen.recipe.named_recipes import NAMED

OPTIONAL = "optional"  # in a field's metadata: saved where it is set, and files without it can be read
SavedTerm = dict[str, object]  # a name and fields; {"narrow": terms, "by": filter} for terms that are narrowed


class Term:
    """One registered part of a recipe. Subclasses are frozen dataclasses with a docstring."""

    registry: ClassVar[dict[str, type[Term]]] = {}
    later: ClassVar[Mapping[str, object]] = {}  # fields that files of earlier versions lack -> what these meant

    def __init_subclass__(cls, abstract: bool = False, **kwargs: object) -> None:
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
        return as_recipe(self) + other

    def __or__(self, by: Term) -> Recipe:
        return as_recipe(self) | by

    def __str__(self) -> str:
        """The spelling, with fields at their defaults left out."""
        fields = sorted(dataclasses.fields(self), key=lambda f: OPTIONAL in f.metadata)  # type: ignore[arg-type]
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in fields if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(shown)})"

    def to_json(self) -> SavedTerm:
        """Every field, so that a changed default never changes a saved file; optional ones only where they are set."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        left_out = {f.name for f in fields if f.metadata.get(OPTIONAL) and getattr(self, f.name) == f.default}
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {"name": type(self).__name__} | {k: v for k, v in values.items() if k not in left_out}

    @staticmethod
    def from_json(data: Mapping[str, object]) -> Term:
        """The inverse of `to_json`. Raises RecipeError on an unknown name or a wrong set of fields."""
        fields = {k: _frozen(v) for k, v in data.items() if k != "name"}
        later = registry()[name].later if (name := str(data.get("name"))) in registry() else {}
        fields = {**later, **fields}
        term = build(name, (), fields)
        wanted = dataclasses.fields(term)  # type: ignore[arg-type]
        missing = {f.name for f in wanted if not f.metadata.get(OPTIONAL)} - set(fields)
        if missing:
            raise RecipeError(f"saved {data['name']} lacks the field(s) {', '.join(sorted(missing))}")
        return term


class Filter(Term, abstract=True):
    """A term that narrows what stands before `|`; it trains nothing by itself."""

    def refuses(self, term: Term) -> str | None:
        """Why no part of what a term trains can be chosen so; None if it can."""
        return None


@dataclass(frozen=True)
class Narrowing:
    """The terms from `start` to `stop` of a recipe, narrowed by a filter."""

    start: int
    stop: int
    by: Filter


@dataclass(frozen=True)
class Recipe:
    """A sum of terms, applied left to right; runs of them may be narrowed.

    Attributes:
        terms: the methods, in order.
        narrowed: which of them keep only a part of their values (`| Select(...)`), and by what.

    Raises:
        RecipeError: it is empty, a filter stands where a method should, or something is narrowed twice.
    """

    terms: tuple[Term, ...]
    narrowed: tuple[Narrowing, ...] = ()

    def __post_init__(self) -> None:
        if not self.terms:
            raise RecipeError("a recipe needs at least one method, for example LN()")
        loose = next((term for term in self.terms if isinstance(term, Filter)), None)
        if loose is not None:
            raise RecipeError(f"{loose} narrows what stands before it: write 'LN() | {loose}', sums in brackets")

    def __add__(self, other: Term | Recipe) -> Recipe:
        if not isinstance(other, Term | Recipe):
            return NotImplemented
        other, n = as_recipe(other), len(self.terms)
        moved = (replace(span, start=span.start + n, stop=span.stop + n) for span in other.narrowed)
        return Recipe(self.terms + other.terms, (*self.narrowed, *moved))

    def __or__(self, by: Term) -> Recipe:
        if not isinstance(by, Filter):
            what = by if isinstance(by, Term | Recipe) else type(by).__name__
            raise RecipeError(f"{what} does not narrow; after '|' comes Select(...), methods are joined by '+'")
        if self.narrowed:
            raise RecipeError(f"{self} is narrowed already; one Select for each method is all there can be")
        return replace(self, narrowed=(Narrowing(0, len(self.terms), by),))

    def __iter__(self) -> Iterator[Term]:
        return iter(self.terms)

    def __len__(self) -> int:
        return len(self.terms)

    @property
    def whole(self) -> Recipe:
        """The same methods, nothing narrowed."""
        return replace(self, narrowed=())

    def narrows(self, index: int) -> bool:
        """Whether the term at this place is narrowed."""
        return any(span.start <= index < span.stop for span in self.narrowed)

    def groups(self) -> Iterator[tuple[tuple[Term, ...], Filter | None]]:
        """The terms in order, in runs: (terms, what narrows them or None)."""
        at = 0
        for span in self.narrowed:
            yield from (((term,), None) for term in self.terms[at : span.start])
            yield self.terms[span.start : span.stop], span.by
            at = span.stop
        yield from (((term,), None) for term in self.terms[at:])

    def __str__(self) -> str:
        groups = list(self.groups())
        parts = [" + ".join(map(str, terms)) + (f" | {by}" if by else "") for terms, by in groups]
        if len(parts) == 1:
            return parts[0]
        return " + ".join(f"({part})" if by else part for part, (_, by) in zip(parts, groups, strict=True))

    def to_json(self) -> list[SavedTerm]:
        """A list of terms, every field of each spelled out; what is narrowed as {"narrow": terms, "by": filter}."""
        return [
            terms[0].to_json() if by is None else {"narrow": [t.to_json() for t in terms], "by": by.to_json()}
            for terms, by in self.groups()
        ]

    @classmethod
    def from_json(cls, data: Sequence[Mapping[str, object]]) -> Recipe:
        """The inverse of `to_json`."""
        parts = [
            cls.from_json(cast(list[SavedTerm], entry["narrow"])) | Term.from_json(cast(SavedTerm, entry["by"]))
            if "narrow" in entry
            else as_recipe(Term.from_json(entry))
            for entry in data
        ]
        return reduce(add, parts) if parts else cls(())


def as_recipe(value: str | Term | Recipe) -> Recipe:
    """A spelling, a single term or a recipe, as a recipe."""
    if isinstance(value, Recipe):
        return value
    if isinstance(value, Term):
        return Recipe((value,))
    if isinstance(value, str):
        return parse(value)
    found = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    raise RecipeError(f"a recipe is a string, a method or a sum of methods such as LN() + LoRA(), not {found}")


def parse(text: str) -> Recipe:
    """Read a spelling such as ``LN() + LoRA(rank=8)``.

    Raises:
        RecipeError: the text is not a sum of registered calls with literal arguments; names the nearest one.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise RecipeError(f"cannot read the recipe {text!r}; write it like 'LN() + LoRA(rank=8)'") from None
    return _recipe(tree.body)


def registry() -> dict[str, type[Term]]:
    """All terms by name; the package's own are loaded when first asked for."""
    for room in ("methods", "planning.selection.select_term"):
        importlib.import_module(f"smidgen.{room}")
    return Term.registry


def build(name: str, args: tuple[object, ...], fields: Mapping[str, object]) -> Term:
    """Make the registered term `name`; unknown names and fields are errors that name the nearest."""
    cls = (known := registry()).get(name)
    if name in NAMED:
        raise RecipeError(f"{name} is a recipe with a name, not a method: write {name}, without brackets")
    if cls is None:
        names = sorted([*known, *NAMED])
        raise RecipeError(f"no method is called {name!r}{nearest(name, names)}; known: {', '.join(names)}")
    signature = inspect.signature(cls)
    allowed, has = list(signature.parameters), ", ".join(signature.parameters) or "no fields"
    if wrong := [field for field in fields if field not in allowed]:
        raise RecipeError(f"{name} has no field {wrong[0]!r}{nearest(wrong[0], allowed)}; it has: {has}")
    try:
        given = signature.bind(*args, **fields)
        return cls(*given.args, **given.kwargs)
    except TypeError as error:
        raise RecipeError(f"{name}: {error}; it has: {has}") from None


def _recipe(node: ast.expr) -> Recipe:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _recipe(node.left) + _recipe(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        if not isinstance(node.right, ast.Call):
            raise RecipeError(f"{ast.unparse(node.right)!r} does not narrow; after '|' comes Select(...)")
        return _recipe(node.left) | _term(node.right)
    return parse(NAMED[node.id]) if isinstance(node, ast.Name) and node.id in NAMED else as_recipe(_term(node))


def _term(node: ast.expr) -> Term:
    """A term from its place in the parsed text."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if any(keyword.arg is None for keyword in node.keywords):
            raise RecipeError(f"'**' is not understood in {ast.unparse(node)!r}")
        fields = {str(k.arg): _literal(k.value) for k in node.keywords}
        return build(node.func.id, tuple(map(_literal, node.args)), fields)
    if isinstance(node, ast.Name) and node.id in registry():
        raise RecipeError(f"{node.id} needs brackets: write {node.id}()")
    if isinstance(node, ast.Name):
        build(node.id, (), {})  # raises, naming the nearest method
    text = ast.unparse(node)
    raise RecipeError(f"{text!r} is not understood in a recipe; only + between methods is, and | Select(...)")


def _literal(node: ast.expr) -> object:
    try:
        return _frozen(ast.literal_eval(node))
    except (ValueError, TypeError, SyntaxError):
        raise RecipeError(f"{ast.unparse(node)!r} is not a number, a string, a tuple, True, False or None") from None


def _frozen(value: object) -> object:
    """Lists become tuples, so that terms stay hashable and JSON round trips."""
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value
