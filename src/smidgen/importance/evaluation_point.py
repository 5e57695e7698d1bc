"""A recipe attached at the point in weight space that a score is taken at: the base, or where a delta led to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from smidgen.common.dtypes import base_dtype, master_dtype
from smidgen.common.errors import AttachError, DataError, PlanError
from smidgen.data.task import Task
from smidgen.delta.attaching import attached
from smidgen.delta.compatibility import head_held
from smidgen.delta.delta import Delta
from smidgen.delta.fingerprint import verify
from smidgen.delta.merging import merge
from smidgen.inference.task_record import TaskRecord
from smidgen.planning.plans import Plan
from smidgen.planning.resolution import resolve
from smidgen.ports.attachment_record import is_attached, trained_parameters
from smidgen.ports.edit import Edit
from smidgen.recipe.recipe import Recipe, Term, as_recipe

NORMS = "LN()"


@contextmanager
def at_point(
    model: nn.Module, recipe: str | Term | Recipe | None, delta: Delta | None, pooling: str | None, seed: int
) -> Iterator[nn.Module]:
    """The model with a recipe attached for the time, nothing narrowed; or a copy of it with a delta folded in.

    Raises:
        PlanError: the recipe trains nothing but the head.
        DataError: another pooling than the delta's.
        AttachError: something is attached already, or the delta cannot be folded.
        DeltaError: the delta belongs to another base.
    """
    if is_attached(model):
        raise AttachError(
            "something is attached already; detach it first, or score it with attached_fisher(model, ...)"
        )
    if delta is not None and pooling not in (None, delta.pooling):
        raise DataError(f"pooling={pooling!r}, but the delta was trained with {delta.pooling!r}; leave pooling out")
    wanted = as_recipe(recipe or _default(delta)).whole
    pooling = delta.pooling if delta is not None else pooling
    plan = resolve(model, wanted, pooling)
    if not plan.entries:
        raise PlanError(f"{wanted} trains nothing but the head, which is left out of the scores; take {NORMS}")
    if delta is None:
        with attached(model, wanted, pooling=pooling, seed=seed):
            yield model
    elif _contains(plan, resolve(model, delta.recipe, delta.pooling, delta.head), delta):
        verify(model, delta.base, head_held(model, delta))
        with attached(model, wanted, pooling=pooling, seed=seed):
            _copy(model, delta)
            yield model
    else:
        folded = _folded(model, delta)
        with attached(folded, wanted, pooling=pooling, seed=seed):
            yield folded


def _default(delta: Delta | None) -> str | Recipe:
    return NORMS if delta is None or not delta.trained else delta.recipe


def _contains(plan: Plan, own: Plan, delta: Delta) -> bool:
    """Whether a plan has all tensors of a delta, the added ones from the same methods."""
    methods = {name: entry.method for entry in plan.entries if entry.added for name, _ in entry.names()}
    wanted = {name: entry.method for entry in own.entries if entry.added for name, _ in entry.names()}
    shapes = plan.shapes
    same = all(shapes.get(name) == tuple(tensor.shape) for name, tensor in delta.tensors.items())
    return same and all(methods.get(name) == method for name, method in wanted.items())


def _copy(model: nn.Module, delta: Delta) -> None:
    parameters = trained_parameters(model)
    with torch.no_grad():
        for name, tensor in delta.tensors.items():
            parameters[name].copy_(tensor)


def _folded(model: nn.Module, delta: Delta) -> nn.Module:
    """A copy in master precision with the delta folded in; its pooling is left to whoever attaches next."""
    verify(model, delta.base, head_held(model, delta))
    plain = resolve(model, delta.recipe, None, delta.head)
    own = dict(model.named_parameters(remove_duplicate=False))
    idle = {name: own[name].detach() for name in plain.shapes if name not in delta.tensors and name in own}
    if delta.pooling is not None:  # a pooler that the pooling leaves without effect was not trained
        head = tuple(name for name, _ in plain.head)
        delta = replace(delta, pooling=None, tensors={**idle, **delta.tensors}, head=head)
    return merge(model, delta, dtype=master_dtype(base_dtype(own))).eval()


def length_of(delta: Delta | None, task: Task, wanted: int | None) -> int | None:
    """The most tokens of an example: what is wanted, or what the delta was trained with.

    Raises:
        DataError: the delta was trained on other labels than the task's.
    """
    if delta is None:
        return wanted
    unnamed = all(name == f"LABEL_{i}" for i, name in enumerate(delta.labels))
    if not unnamed and tuple(task.labels) != delta.labels:
        raise DataError(
            f"the data has the labels {', '.join(task.labels) or 'none'}; "
            f"the delta was trained on {', '.join(delta.labels)}"
        )
    return TaskRecord.of(delta.info).max_length if wanted is None else wanted


def check_still(model: nn.Module) -> None:
    """Raise DataError if examples would not be told apart, or would not give the same twice."""
    for path, module in model.named_modules():
        running = getattr(module, "running_mean", None) is not None
        if module.training and (running or _drops(module)):
            what = "with running statistics" if running else "with dropout active"
            raise DataError(f"{path} ({type(module).__name__}) is in training mode {what}; call model.eval()")


def _drops(module: nn.Module) -> bool:
    rates = [module.method.input_dropout()] if isinstance(module, Edit) else []
    rates += [value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
    rates += [module.p] if isinstance(module, nn.modules.dropout._DropoutNd) else []
    return any(rate > 0 for rate in rates)
