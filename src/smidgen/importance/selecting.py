"""select: a recipe with Select, a model and a task -> what to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from smidgen.common.errors import AttachError, DataError, RecipeError
from smidgen.common.wrappers import bare
from smidgen.data.processor import Processor, given_processor
from smidgen.data.task import Task
from smidgen.delta.attaching import attached
from smidgen.delta.compatibility import head_held
from smidgen.delta.delta import Delta
from smidgen.delta.fingerprint import Fingerprint, verify
from smidgen.delta.saved_selection import Selection
from smidgen.importance.evaluation_point import check_still
from smidgen.importance.fisher_information import attached_fisher, attached_mean_gradients
from smidgen.importance.sample import Sample
from smidgen.importance.warmup import Course, take
from smidgen.inference.processors import processor_of
from smidgen.methods.base import Method, renewed
from smidgen.planning.plans import Plan
from smidgen.planning.resolution import resolve
from smidgen.planning.selection.budgets import choose, entries_of
from smidgen.planning.selection.data_free_scores import READY
from smidgen.planning.selection.kept_shapes import chosen_indices, narrowed_shapes
from smidgen.planning.selection.select_term import SCOUT, Select
from smidgen.ports.attachment_record import attachment, is_attached
from smidgen.recipe.recipe import Narrowing, Recipe, Term, as_recipe
from smidgen.sites.site import Site
from smidgen.steps.objectives import Objective

Scores = Mapping[str, Tensor]


@dataclass(frozen=True)
class Means:
    """What scoring needs beside the model: the data and how to read it, and the rates of a warm-up."""

    task: Task | None
    processor: Processor | None
    seed: int
    batch_size: int
    max_length: int | None
    lr: float | None
    head_lr: float | None
    objective: Objective | None


def select(  # noqa: PLR0913 - options by keyword
    model: nn.Module,
    recipe: str | Term | Recipe,
    task: Task | None = None,
    *,
    scores: Scores | None = None,
    seed: int = 0,
    pooling: str | None = None,
    processor: Processor | None = None,
    tokenizer: Processor | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    lr: float | None = None,
    head_lr: float | None = None,
    objective: Objective | None = None,
) -> Selection:
    """Choose what a recipe with Select keeps; the model comes back bit for bit. `fit` calls it for you.

    Args:
        task: its train split is what scores are computed from; "magnitude" and "random" need none.
        scores: saved name -> score of each value, instead of computing them (see `score`).
        seed: of tensors that start at random, as in `attach`.
        processor: makes the model's inputs, by default the one of its name; `tokenizer` is another name of it.
        batch_size, max_length, lr, head_lr, objective: as in `fit`; the last three are of a warm-up.

    Raises:
        RecipeError: the recipe has no Select.
        AttachError: something is attached.
        DataError: a score that needs data without data, labels that do not fit the model's head, dropout that is on.
        PlanError: a budget larger than what there is, or units that the model does not have.
    """
    model, recipe = bare(model), as_recipe(recipe)
    means = Means(task, given_processor(processor, tokenizer), seed, batch_size, max_length, lr, head_lr, objective)
    _check(model, recipe)
    plan = resolve(model, recipe, pooling)
    indices: dict[str, Tensor] = {}
    for span in recipe.narrowed:
        found = scores if scores is not None else _candidate_scores(model, plan, span, means)
        indices |= choose(model, plan, span, found)
    base = Fingerprint.of(model, (*(name for name, _ in plan.head), *renewed(recipe, model)))
    info = {} if task is None else {"task": task.name, "data": task.fingerprint}
    return Selection(recipe, indices, narrowed_shapes(plan), base, info)


def score(  # noqa: PLR0913 - options by keyword
    model: nn.Module, recipe: str | Term | Recipe, task: Task | None = None, *, pooling: str | None = None,
    processor: Processor | None = None, tokenizer: Processor | None = None, seed: int = 0, batch_size: int = 32,
    max_length: int | None = None, lr: float | None = None, head_lr: float | None = None,
    objective: Objective | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The scores that `select` ranks by: saved name -> tensor in the shape of the values. Arguments as there.

    Raises:
        RecipeError, AttachError, DataError, PlanError: as `select` does.
    """
    model, recipe = bare(model), as_recipe(recipe)
    _check(model, recipe)
    means = Means(task, given_processor(processor, tokenizer), seed, batch_size, max_length, lr, head_lr, objective)
    plan = resolve(model, recipe, pooling)
    found: dict[str, Tensor] = {}
    for span in recipe.narrowed:
        found |= _candidate_scores(model, plan, span, means)
    return found


def selection_of(model: nn.Module, delta: Delta) -> Selection:
    """What a trained delta kept, to be used again on another task of the same base.

    Raises:
        DeltaError: the delta belongs to another base.
        RecipeError: its recipe has no Select.
    """
    model = bare(model)
    _check(model, delta.recipe)
    verify(model, delta.base, head_held(model, delta))
    plan = resolve(model, delta.recipe, delta.pooling, delta.head)
    info = {"task": delta.info.get("task", {}).get("name"), **delta.info.get("selection", {})}
    base = Fingerprint.of(model, head_held(model, delta))
    return Selection(delta.recipe, chosen_indices(plan, delta.tensors), narrowed_shapes(plan), base, info)


def _check(model: nn.Module, recipe: Recipe) -> None:
    if is_attached(model):
        raise AttachError("something is attached already, and scores are those of the base; detach it first")
    if not recipe.narrowed:
        raise RecipeError(f"{recipe} has nothing to choose; write '{recipe} | Select(\"fisher\", keep=0.1)'")


def _candidate_scores(model: nn.Module, plan: Plan, span: Narrowing, means: Means) -> dict[str, Tensor]:
    """Saved name -> score of every value, in the tensor's shape, that one `| Select` may keep, on the CPU."""
    by = span.by
    if not isinstance(by, Select):
        raise RecipeError(f"{by} has no score")
    if by.score in READY:
        return READY[by.score](model, plan, span, means.seed)
    if means.task is None:
        raise DataError(f"{by} needs data to choose by: give task=; 'magnitude' and 'random' need none")
    check_still(model)
    means = replace(means, processor=means.processor or processor_of(model, means.task.task_kind))
    if by.score == SCOUT:
        return _scouted(model, plan, span, by, means)
    with attached(model, plan.recipe.whole, pooling=plan.pooling, seed=means.seed):
        found = _from_data(model, by, means)
        names = {entry.name(term) for entry in entries_of(plan, span) for term, _ in entry.terms}
        return {name: found[name].detach().cpu() for name in names}


def _scouted(model: nn.Module, plan: Plan, span: Narrowing, by: Select, means: Means) -> dict[str, Tensor]:
    """Scores of one method's values by how far those of its scout move in the same places."""
    terms = list(plan.recipe.whole)
    for index in range(span.start, span.stop):
        scout = cast(Method[Site], terms[index]).scout()
        assert scout is not None  # Select takes no method without one
        terms[index] = scout
    with attached(model, Recipe(tuple(terms)), pooling=plan.pooling, seed=means.seed):
        change, _ = _course(model, by, means)
        scouts = {(entry.index, entry.site.name): entry for entry in attachment(model).plan.entries}
    found = {}
    for entry in entries_of(plan, span):
        other = scouts[entry.index, entry.site.name]
        for (term, _), (symbol, _) in zip(entry.terms, other.terms, strict=True):
            found[entry.name(term)] = change[other.name(symbol)].detach().cpu().square()
    return found


def _course(model: nn.Module, by: Select, means: Means) -> tuple[Scores, Scores]:
    """|change| and movement of what is attached over a warm-up."""
    assert means.task is not None
    assert means.processor is not None
    course = Course(
        by.warmup, by.seed, lr=means.lr, head_lr=means.head_lr, objective=means.objective,
        batch_size=means.batch_size, max_length=means.max_length,
    )  # fmt: skip
    return take(model, means.task, course, means.processor)


def _from_data(model: nn.Module, by: Select, means: Means) -> Scores:
    """Scores of what is attached; a warm-up leaves its mark on the masters, which are dropped afterwards."""
    assert means.task is not None
    assert means.processor is not None
    change: Scores = {}
    movement: Scores = {}
    if by.warmup:
        change, movement = _course(model, by, means)
    if by.score in ("change", "movement"):
        return change if by.score == "change" else movement
    sample = Sample.of_task(means.task, means.processor, "train", by.examples, by.seed, means.max_length, model)
    if by.score == "gradient":
        gradients = attached_mean_gradients(model, sample, batch_size=means.batch_size)
        return {name: gradient.abs() for name, gradient in gradients.items()}
    return attached_fisher(model, sample, kind=by.kind, seed=by.seed, batch_size=means.batch_size)
