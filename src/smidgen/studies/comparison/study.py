"""Study: what is compared with what, on what, how often; one TOML file, or keywords."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from smidgen.common.errors import SmidgenError, StudyError, nearest
from smidgen.data.task import Task
from smidgen.planning.selection.select_term import Select
from smidgen.recipe.recipe import Recipe, as_recipe
from smidgen.training.run.settings import Settings

Examples = Annotated[int, Field(ge=1)] | Literal["all"]
Rate = Annotated[float, Field(gt=0)]


def _recipe_alone(value: object) -> object:
    return {"recipe": value} if isinstance(value, str) else value


def _data_alone(value: object) -> object:
    return {"data": value} if isinstance(value, str) else value


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StudyArm(_Part):
    """What is trained.

    Attributes:
        recipe: as it is written.
        lr: its own rates to try; None for the study's.
        pooling: as in `fit`.
        scratch: the same class with fresh weights, drawn by the seed of the run: what pretraining is worth.
    """

    recipe: str
    lr: tuple[Rate, ...] | None = None
    pooling: str | None = None
    scratch: bool = False

    @property
    def parsed(self) -> Recipe:
        """The recipe. Raises RecipeError if it is none."""
        return as_recipe(self.recipe)

    def drawn(self, seed: int) -> Recipe:
        """The recipe of a run: what its Selects draw (values, examples, a warm-up's batches) is drawn by its seed."""
        recipe = self.parsed
        spans = (
            replace(span, by=replace(span.by, seed=span.by.seed + seed)) if isinstance(span.by, Select) else span
            for span in recipe.narrowed
        )
        return replace(recipe, narrowed=tuple(spans))


class Data(_Part):
    """A task: arguments of `Task.load`. `name`: in tables, by default the task's own."""

    data: str
    name: str | None = None
    kind: str | None = None
    text: tuple[str, ...] | None = None
    label: str | None = None
    metric: str | None = None
    limit: dict[str, int] | None = None

    def load(self) -> Task:
        """Read it. Raises DataError."""
        return Task.load(
            self.data, kind=self.kind, text=self.text, label=self.label, metric=self.metric, name=self.name,
            limit=self.limit, validation=0,
        )  # fmt: skip


class Study(_Part):
    """A grid of models x arms x tasks x examples x seeds, each arm with as many learning rates to try.

    Attributes:
        arms: name -> what is trained; a text is a recipe.
        tasks: sources of data; a text is its path, name or hub id.
        reference: name of the arm that the others are compared with; by default the first.
        margin: of the metric; arms that differ by less count as equal (see `smidgen.studies.statistics`).
        seeds: of a run: the draw of its examples, of heads, of the order, of dropout, of what Select draws.
        lr: rates that each arm tries, unless it has its own; None for `trials` rates around the recipe's own.
        tuning_seeds: so many of the seeds try every rate; the others run at the best.
        examples: sizes of the training split; "all" of it.
        validation: share, or number of rows, of train that chooses epochs and rates where a source has no split for it.
        settings: of `fit`, the same for all arms: epochs, batch_size, max_length, ...
        dtype: of the bases.
    """

    name: str = "study"
    models: tuple[str, ...] = ("minilm",)
    arms: dict[str, Annotated[StudyArm, BeforeValidator(_recipe_alone)]]
    tasks: tuple[Annotated[Data, BeforeValidator(_data_alone)], ...]
    reference: str | None = None
    margin: Annotated[float, Field(gt=0)] = 0.02
    seeds: tuple[int, ...] = (0, 1, 2)
    lr: tuple[Rate, ...] | None = None
    trials: Annotated[int, Field(ge=1)] = 4
    tuning_seeds: Annotated[int, Field(ge=1)] = 1
    examples: tuple[Examples, ...] = ("all",)
    validation: float | int = 0.1
    settings: dict[str, float | int | str | bool | None] = {}
    dtype: str = "float32"

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """A study from a .toml file. Raises StudyError, naming the file and the place in it."""
        try:
            found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise StudyError(f"{path} is no TOML file: {error}") from None
        return cls.of(found, where=f"{path}: ")

    @classmethod
    def of(cls, given: Mapping[str, object], where: str = "") -> Self:
        """A study from plain data. Raises StudyError: the first thing that is wrong, and where."""
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise StudyError(where + _first(error, cls)) from None

    @property
    def against(self) -> str:
        """Name of the arm that the others are compared with."""
        return self.reference or next(iter(self.arms))

    @property
    def rates_each(self) -> int:
        """How many rates each arm tries."""
        return next((len(rates) for rates in self._grids() if rates is not None), self.trials)

    @property
    def runs(self) -> int:
        """How many runs of `fit` the whole study takes."""
        each = self.rates_each * self.tuning_seeds + len(self.seeds) - self.tuning_seeds
        return each * len(self.arms) * len(self.tasks) * len(self.models) * len(self.examples)

    def _grids(self) -> list[tuple[float, ...] | None]:
        return [arm.lr or self.lr for arm in self.arms.values()]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        """What the parts say of each other: nothing twice, equal trials, a reference that is there, sound settings."""
        for name in ("models", "arms", "tasks", "seeds", "examples"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} names none; a study needs at least one")
            if isinstance(values, tuple) and any(value in values[:i] for i, value in enumerate(values)):
                raise ValueError(f"{name} names one of them twice: {', '.join(map(str, values))}")
        self._check_arms()
        if self.against not in self.arms:
            known = ", ".join(self.arms)
            raise ValueError(
                f"reference={self.against!r} is no arm; there are {known}{nearest(self.against, self.arms)}"
            )
        if self.tuning_seeds > len(self.seeds):
            raise ValueError(f"tuning_seeds={self.tuning_seeds} are more than the {len(self.seeds)} seeds")
        counts = {
            name: self.trials if grid is None else len(set(grid))
            for name, grid in zip(self.arms, self._grids(), strict=True)
        }
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(f"every arm must try as many rates, found {told}; name as many for each, or set trials=")
        own = {"seed", "lr", "head_lr", "pooling"} & self.settings.keys()
        if own:
            raise ValueError(f"settings names {min(own)}, which the study itself varies; leave it out")
        _checked(lambda: Settings.of(self.settings))
        return self

    def _check_arms(self) -> None:
        seen: dict[tuple[str, str | None, bool], str] = {}
        for name, arm in self.arms.items():
            key = (str(_checked(lambda arm=arm: arm.parsed, f"arm {name!r}: ")), arm.pooling, arm.scratch)
            if key in seen:
                raise ValueError(f"arms {seen[key]!r} and {name!r} are the same: {key[0]}")
            seen[key] = name


def _checked(make: object, where: str = "") -> object:
    """What a function gives; its error as one that pydantic tells the place of."""
    assert callable(make)
    try:
        return make()
    except SmidgenError as error:
        raise ValueError(f"{where}{error}") from None


def _first(error: ValidationError, cls: type[BaseModel]) -> str:
    """The first of pydantic's errors in one line, with its place."""
    found = error.errors()[0]
    place = ".".join(str(part) for part in found["loc"] if not str(part).startswith("function-"))
    if found["type"] == "extra_forbidden":
        parts: dict[str, type[BaseModel]] = {"arms": StudyArm, "tasks": Data}
        fields = parts.get(place.partition(".")[0] if "." in place else "", cls).model_fields
        last = place.rpartition(".")[2]
        return f"unknown field {place}; there are {', '.join(fields)}{nearest(last, fields)}"
    said = found["msg"].removeprefix("Value error, ")
    return f"{place}: {said}, found {found['input']!r}" if place else said
