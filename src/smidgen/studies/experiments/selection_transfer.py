"""Carry-over: what other tasks select, used on a task that none of them has seen."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict, Unpack, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from smidgen.common.errors import DataError, nearest
from smidgen.common.json_numbers import plain
from smidgen.data.task import Task
from smidgen.delta.saved_selection import Selection
from smidgen.importance.selecting import score, select
from smidgen.inference.loading import load
from smidgen.planning.resolution import resolve
from smidgen.planning.selection.budgets import chance_overlap
from smidgen.planning.selection.combine_scores import combine
from smidgen.planning.selection.select_term import Select
from smidgen.recipe.recipe import Recipe, Term, as_recipe
from smidgen.studies.experiments.arm import Bench, Outcome
from smidgen.training.run.settings import UnseededOptions

ARMS = ("own", "transferred", "random", "all")
Scores = dict[str, Tensor]
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Transfer:
    """Overlaps of what tasks select, and what a task makes of its own, the others', a random and no selection.

    Attributes:
        tasks: names.
        overlaps: (seeds, tasks, tasks): values that two tasks both keep over values that one keeps.
        carried: target -> for each seed, overlap of its own selection with that of the others.
        chance: overlap of two random selections.
        outcomes: one entry per run: "task", "arm" (of `ARMS`), "seed", "metric", "value", "trained", ...
    """

    model: str
    recipe: str
    how: str
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    overlaps: NDArray[np.float64]
    carried: dict[str, list[float]]
    chance: float
    outcomes: tuple[Outcome, ...] = field(default=())

    def values(self, task: str, arm: str) -> list[float]:
        """The task's metric in this arm, one number per seed."""
        return [run["value"] for run in self.outcomes if run["task"] == task and run["arm"] == arm]

    def to_json(self) -> dict[str, object]:
        """Everything as plain data."""
        whole = {**vars(self), "overlaps": self.overlaps.tolist(), "outcomes": list(self.outcomes)}
        return plain(whole)


def measure_transfer(  # noqa: PLR0913 - options by keyword
    model_name: str | os.PathLike[str],
    tasks: Sequence[Task],
    recipe: str | Term | Recipe = "LN() | Select('fisher', keep=0.1)",
    *,
    targets: Sequence[str] | None = None,
    how: str = "mean",
    seeds: int = 3,
    split: str = "test",
    out: str | os.PathLike[str] | None = None,
    say: Say | None = None,
    **settings: Unpack[UnseededOptions],
) -> Transfer:
    """Leave one task out: select on the others, combine, train on the one left out, and compare.

    Every arm trains the same number of values but "all"; heads, settings and seeds are the same in all.

    Args:
        targets: names of the tasks to leave out, one after the other; all by default.
        how: how the others' scores become one: "mean", "rank" or "union" (see `smidgen.combine`).
        out: folder for finished runs; the same call goes on there.
        settings: fields of `Settings`, as in `fit`, but the seed.

    Raises:
        DataError: fewer than two tasks, two of one name, a target that is none of them, or a recipe without one Select.
    """
    recipe, names = as_recipe(recipe), [task.name for task in tasks]
    wanted = _checked(recipe, names, names if targets is None else list(targets))
    folder = None if out is None else Path(out)
    setting = _Setting(model_name, tuple(tasks), recipe, how, split, folder, settings, say or (lambda line: None))
    return setting.run(wanted, seeds)


class _ScoreOptions(TypedDict, total=False):
    """The settings that scores depend on as well."""

    pooling: str | None
    batch_size: int
    max_length: int | None
    lr: float | None
    head_lr: float | None


@dataclass(frozen=True)
class _Setting:
    """What is the same for all seeds and targets."""

    model_name: str | os.PathLike[str]
    tasks: tuple[Task, ...]
    recipe: Recipe
    how: str
    split: str
    folder: Path | None
    settings: UnseededOptions
    say: Say

    def run(self, targets: Sequence[str], seeds: int) -> Transfer:
        """Every target with every seed."""
        names = tuple(task.name for task in self.tasks)
        overlaps = np.full((seeds, len(names), len(names)), np.nan)
        carried: dict[str, list[float]] = {name: [] for name in targets}
        outcomes: list[Outcome] = []
        for seed in range(seeds):
            found, own = self.scored(seed)
            overlaps[seed] = [[a.overlap(b) for b in own.values()] for a in own.values()]
            for target in targets:
                runs, overlap = self.left_out(self.tasks[names.index(target)], seed, found, own[target])
                outcomes += runs
                carried[target].append(overlap)
        model = load(self.model_name, task=self.tasks[0])[0]
        plan = resolve(model, self.recipe, self.settings.get("pooling"))
        chance = chance_overlap(model, plan, self.recipe.narrowed[0])
        return Transfer(
            model=os.fspath(self.model_name),
            recipe=str(self.recipe),
            how=self.how,
            tasks=names,
            seeds=tuple(range(seeds)),
            overlaps=overlaps,
            carried=carried,
            chance=chance,
            outcomes=tuple(outcomes),
        )

    def scored(self, seed: int) -> tuple[dict[str, Scores], dict[str, Selection]]:
        """Scores and own selection of every task, under this seed's head."""
        names = _ScoreOptions.__annotations__
        kept = cast(_ScoreOptions, {key: value for key, value in self.settings.items() if key in names})
        found, own = {}, {}
        for task in self.tasks:
            model, processor = load(self.model_name, task=task, seed=seed)
            scores = score(model, self.recipe, task, processor=processor, seed=seed, **kept)
            chosen = select(model, self.recipe, task, scores=scores, pooling=self.settings.get("pooling"))
            found[task.name], own[task.name] = scores, chosen
            self.say(f"{task.name}, seed {seed}: {chosen.kept:,} of {chosen.candidates:,} values selected")
        return found, own

    def left_out(self, task: Task, seed: int, scores: dict[str, Scores], own: Selection) -> tuple[list[Outcome], float]:
        """All arms of one target, and how far its own selection is that of the others."""
        model, processor = load(self.model_name, task=task, seed=seed)
        others = {name: found for name, found in scores.items() if name != task.name}
        carried = carry(model, self.recipe, others, self.how, self.settings)
        bench = Bench(model, processor, task, seed, self.settings, self.split, self.folder)
        runs = []
        drawn = _random(model, self.recipe, seed, self.settings)
        for arm, chosen in zip(ARMS, (own, carried, drawn, None), strict=True):
            run = bench.run(arm, self.recipe.whole if chosen is None else self.recipe, chosen)
            self.say(f"{task.name}, {arm}, seed {seed}: {run['metric']} {run['value']:.4f} ({run['trained']:,} values)")
            runs.append(run)
        return runs, own.overlap(carried)


def choose_on(
    model_name: str | os.PathLike[str],
    tasks: Sequence[Task],
    recipe: str | Term | Recipe,
    *,
    how: str = "mean",
    seed: int = 0,
    **settings: Unpack[UnseededOptions],
) -> Selection:
    """What one task chooses, or several together; no task is needed for a score that needs no data.

    Args:
        settings: pooling, batch_size, max_length, lr, head_lr, as in `smidgen.select`.

    Raises:
        DataError: two tasks of one name, a recipe without one Select, or a score that needs data without data.
    """
    recipe = as_recipe(recipe)
    if not tasks:
        return select(load(model_name)[0], recipe, seed=seed, pooling=settings.get("pooling"))
    names = [task.name for task in tasks]
    _checked(recipe, names if len(names) > 1 else [*names, ""], [])
    setting = _Setting(model_name, tuple(tasks), recipe, how, "", None, settings, lambda line: None)
    found, own = setting.scored(seed)
    if len(tasks) == 1:
        return own[names[0]]
    return carry(load(model_name, task=tasks[-1], seed=seed)[0], recipe, found, how, settings)


def carry(
    model: nn.Module,
    recipe: Recipe,
    scores: dict[str, Scores],
    how: str = "mean",
    settings: UnseededOptions | None = None,
) -> Selection:
    """The selection that the scores of several tasks make together, trimmed to the recipe's budget."""
    pooling = (settings or {}).get("pooling")
    plan = resolve(model, recipe, pooling)
    together = combine(model, plan, recipe.narrowed[0], list(scores.values()), how)
    chosen = select(model, recipe, scores=together, pooling=pooling)
    return replace(chosen, info={"tasks": list(scores), "how": how})


def _checked(recipe: Recipe, names: Sequence[str], targets: Sequence[str]) -> list[str]:
    """The tasks to leave out in turn; DataError where the names or the recipe do not allow it."""
    if len(names) < 2:
        raise DataError(f"carry-over needs at least two tasks, found {', '.join(names) or 'none'}")
    if len(set(names)) < len(names):
        raise DataError(f"two tasks have one name ({', '.join(names)}); give each its own with Task.load(..., name=)")
    for target in targets:
        if target not in names:
            raise DataError(f"{target!r} is none of the tasks {', '.join(names)}{nearest(target, names)}")
    if len(recipe.narrowed) != 1 or not isinstance(recipe.narrowed[0].by, Select):
        raise DataError(f"carry-over needs a recipe with one Select, such as LN() | Select('fisher'); found {recipe}")
    return list(targets)


def _random(model: nn.Module, recipe: Recipe, seed: int, settings: UnseededOptions) -> Selection:
    (span,) = recipe.narrowed
    by = cast(Select, span.by)
    drawn = replace(recipe, narrowed=(replace(span, by=replace(by, score="random", warmup=0, seed=seed)),))
    chosen = select(model, drawn, pooling=settings.get("pooling"), seed=seed)
    return replace(chosen, recipe=recipe, info={"random": seed})
