"""How far a selection by Fisher information can be trusted: what changes when examples, head or kind change."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict, Unpack, cast

from torch import Tensor, nn

from smidgen.common.errors import DataError
from smidgen.common.json_numbers import plain
from smidgen.data.task import Task
from smidgen.delta.delta import Delta
from smidgen.delta.saved_selection import Selection
from smidgen.importance.fisher_information import fisher
from smidgen.importance.selecting import select
from smidgen.inference.loading import load
from smidgen.planning.resolution import resolve
from smidgen.planning.selection.budgets import chance_overlap
from smidgen.planning.selection.select_term import Select
from smidgen.recipe.recipe import Recipe, Term, as_recipe
from smidgen.studies.experiments.fisher_mass import FisherMass
from smidgen.studies.experiments.model_components import stack_names
from smidgen.training.fitting import fit

COUNTS = (32, 64, 128, 256, 512, 1024, 2048)
OUTLIER = 3.0  # standard deviations


@dataclass(frozen=True, eq=False)
class Trust:
    """Overlaps of selections of one budget, under everything that should not matter, and some that may.

    Attributes:
        chance: overlap of two random selections.
        enough: counts of examples, ascending.
        draws: for each count, overlaps between independent draws of so many examples.
        reference: for each count, overlaps with the selection from the largest count.
        heads: overlaps between fresh heads of different seeds.
        warmed: overlaps between heads of different seeds after training each of them alone.
        fresh_to_warmed: for each seed, overlap of the fresh head's selection with the trained head's.
        kinds: kind -> overlap with "empirical", at the trained head.
        outliers: share of the selection that lies on outlier values, and the share of outliers among all values.
        mass: head ("fresh head", "trained head") -> share of the mass by layer and by term.
    """

    model: str
    task: str
    recipe: str
    chance: float
    enough: tuple[int, ...]
    draws: tuple[tuple[float, ...], ...]
    reference: tuple[tuple[float, ...], ...]
    heads: tuple[float, ...]
    warmed: tuple[float, ...]
    fresh_to_warmed: tuple[float, ...]
    kinds: dict[str, float]
    outliers: tuple[float, float]
    mass: dict[str, dict[str, float]]

    def examples_needed(self, overlap: float = 0.9) -> int | None:
        """The smallest count whose independent draws agree so far on average; None if none does."""
        means = (sum(found) / len(found) for found in self.draws)
        return next((n for n, mean in zip(self.enough, means, strict=True) if mean >= overlap), None)

    def to_json(self) -> dict[str, object]:
        """Everything as plain data."""
        return plain({**vars(self), "examples_needed": self.examples_needed()})


class FisherOptions(TypedDict, total=False):
    """How examples are read, by `fisher` and by `fit`."""

    batch_size: int
    max_length: int | None
    pooling: str | None


class _Heads(TypedDict):
    """What a selection owes to its head, as fields of `Trust`."""

    chance: float
    heads: tuple[float, ...]
    warmed: tuple[float, ...]
    fresh_to_warmed: tuple[float, ...]
    kinds: dict[str, float]
    outliers: tuple[float, float]
    mass: dict[str, dict[str, float]]


@dataclass(frozen=True)
class _Probe:
    """Selections of one task under different conditions."""

    model_name: str | os.PathLike[str]
    task: Task
    recipe: Recipe
    options: FisherOptions

    def information(
        self, head: int, examples: int, draw: int, delta: Delta | None = None, kind: str = "empirical"
    ) -> dict[str, Tensor]:
        """Fisher information with the head of one seed, over one draw of examples."""
        model, processor = load(self.model_name, task=self.task, seed=head)
        return fisher(
            model, self.task, self.recipe.whole, delta, examples, kind, seed=draw, processor=processor, **self.options
        )

    @cached_property
    def model(self) -> nn.Module:
        """The base with some head: what is chosen does not depend on which."""
        return load(self.model_name, task=self.task)[0]

    @property
    def chance(self) -> float:
        """Overlap of two random selections of the recipe's budget."""
        plan = resolve(self.model, self.recipe, self.options.get("pooling"))
        return chance_overlap(self.model, plan, self.recipe.narrowed[0])

    def chosen(self, scores: Mapping[str, Tensor]) -> Selection:
        """What the recipe's budget keeps by these scores."""
        return select(self.model, self.recipe, scores=scores, pooling=self.options.get("pooling"))


def measure_stability(
    model_name: str | os.PathLike[str],
    task: Task,
    recipe: str | Term | Recipe = "LN() | Select('fisher', keep=0.1)",
    *,
    counts: Sequence[int] = COUNTS,
    seeds: int = 3,
    say: Callable[[str], None] | None = None,
    head_epochs: int = 1,
    **options: Unpack[FisherOptions],
) -> Trust:
    """Repeat a selection with other examples, other heads and other kinds of Fisher information.

    Args:
        counts: of examples; those above what train has are left out.
        seeds: draws and heads to compare, at least 2.
        head_epochs: training of the head alone that makes a "warmed" head.
        options: batch_size, max_length, pooling, as in `fisher`.

    Raises:
        DataError: fewer than two seeds or counts, or a recipe without one Select.
    """
    recipe, note = as_recipe(recipe), say or (lambda text: None)
    sizes = _sizes(recipe, task, counts, seeds)
    probe, most = _Probe(model_name, task, recipe, options), sizes[-1]
    best = probe.information(0, most, draw=seeds)
    draws, reference = _by_count(probe, sizes, seeds, probe.chosen(best), note)
    deltas = [_warm(probe, head, head_epochs) for head in range(seeds)]
    heads = _heads(probe, most, deltas, best)
    note(f"{task.name}: {seeds} heads, fresh and trained, compared")
    about = (os.fspath(model_name), task.name, str(recipe))
    return Trust(*about, enough=tuple(sizes), draws=draws, reference=reference, **heads)


def _heads(probe: _Probe, most: int, deltas: Sequence[Delta], best: Mapping[str, Tensor]) -> _Heads:
    """What the selection owes to the head, and to the kind of information; where the mass lies."""
    model, seeds = probe.model, range(len(deltas))
    fresh = [probe.chosen(probe.information(head, most, draw=0)) for head in seeds]
    informed = [probe.information(head, most, draw=0, delta=deltas[head]) for head in seeds]
    warmed = [probe.chosen(information) for information in informed]
    return {
        "chance": probe.chance,
        "heads": tuple(_pairs(fresh)),
        "warmed": tuple(_pairs(warmed)),
        "fresh_to_warmed": tuple(a.overlap(b) for a, b in zip(fresh, warmed, strict=True)),
        "kinds": _kinds(probe, most, deltas[0], warmed[0]),
        "outliers": _outliers(model, warmed[0]),
        "mass": {"fresh head": mass(model, best), "trained head": mass(model, informed[0])},
    }


def _sizes(recipe: Recipe, task: Task, counts: Sequence[int], seeds: int) -> list[int]:
    """The counts that train has examples for."""
    sizes = sorted({n for n in counts if 0 < n <= len(task.split("train"))})
    by = [span.by for span in recipe.narrowed]
    fits = len(by) == 1 and isinstance(by[0], Select) and by[0].score == "fisher"
    if seeds < 2 or len(sizes) < 2 or not fits:
        raise DataError(
            f"trust needs two seeds, two counts up to {len(task.split('train')):,} examples, one Select('fisher'); "
            f"found {seeds} seeds, counts {sizes}, {recipe}"
        )
    return sizes


def _by_count(
    probe: _Probe, sizes: Sequence[int], seeds: int, best: Selection, note: Callable[[str], None]
) -> tuple[tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...]]:
    draws, reference = [], []
    for count in sizes:
        found = [probe.chosen(probe.information(0, count, draw)) for draw in range(seeds)]
        draws.append(tuple(_pairs(found)))
        reference.append(tuple(one.overlap(best) for one in found))
        note(f"{probe.task.name}, {count} examples: draws agree on {sum(draws[-1]) / len(draws[-1]):.2f}")
    return tuple(draws), tuple(reference)


def _warm(probe: _Probe, head: int, epochs: int) -> Delta:
    model, processor = load(probe.model_name, task=probe.task, seed=head)
    options = cast(FisherOptions, {k: v for k, v in probe.options.items() if k in FisherOptions.__annotations__})
    return fit(model, "Head()", probe.task, seed=head, epochs=epochs, processor=processor, **options)


def _kinds(probe: _Probe, count: int, delta: Delta, empirical: Selection) -> dict[str, float]:
    """Overlap of the other kinds with the empirical one, where the task has them."""
    kinds = ("true", "expected") if probe.task.task_kind.uncountable is None else ("true",)
    found = {kind: probe.chosen(probe.information(0, count, 0, delta, kind)) for kind in kinds}
    return {kind: chosen.overlap(empirical) for kind, chosen in found.items()}


def _pairs(chosen: Sequence[Selection]) -> Iterator[float]:
    for i, one in enumerate(chosen):
        yield from (one.overlap(other) for other in chosen[i + 1 :])


def mass(model: nn.Module, information: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of the whole mass by layer ("layer 0", "outside the layers") and by term ("gain", "bias", ...)."""
    found = FisherMass.of(model, information)
    names, layers = stack_names(found.parts), found.table(("stack", "layer"))
    places = sorted(layers, key=lambda key: (key[0], -1 if key[1] is None else key[1]))
    shares = {
        "outside the layers" if layer is None else f"{names[stack]} layer {layer}".strip(): layers[stack, layer].share
        for stack, layer in places
    }
    return shares | {term: cell.share for (term,), cell in found.table(("term",)).items()}


def _outliers(model: nn.Module, chosen: Selection) -> tuple[float, float]:
    """Share of outliers (beyond 3 standard deviations of their tensor) among the chosen values, and among all."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    hit = odd = 0
    for name in chosen.indices:
        if name in parameters:
            values = parameters[name].detach().double()
            outside = (values - values.mean()).abs() > OUTLIER * values.std(correction=0)
            odd += int(outside.sum())
            hit += int((outside & chosen.mask(name)).sum())
    return hit / max(1, chosen.kept), odd / max(1, chosen.candidates)
