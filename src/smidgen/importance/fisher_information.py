"""Exact diagonal Fisher information, example by example, of what a recipe would train; and the mean gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smidgen.common.errors import DataError, PlanError
from smidgen.common.wrappers import bare
from smidgen.data.processor import Processor, given_processor
from smidgen.data.task import Task
from smidgen.delta.delta import Delta
from smidgen.importance.evaluation_point import at_point, check_still, length_of
from smidgen.importance.likelihood import Likelihood
from smidgen.importance.per_example_squares import frozen, gradients, squared_gradients
from smidgen.importance.sample import Sample
from smidgen.importance.targets import tensors_of
from smidgen.inference.processors import processor_of
from smidgen.recipe.recipe import Recipe, Term

CHUNK_BYTES = 32 * 2**20


class Measured(dict[str, Tensor]):
    """Saved name -> values on the CPU, in the tensor's shape, and what they were taken over.

    Attributes:
        examples: number of examples that were used.
        kind: "empirical", "true" or "expected".
        split: name of the split.
        looped: names of tensors whose examples no hook tells apart: exact as well, but one example at a time.
    """

    def __init__(self, values: dict[str, Tensor], sample: Sample, kind: str, looped: tuple[str, ...] = ()) -> None:
        super().__init__({name: (value / len(sample)).cpu() for name, value in values.items()})
        self.examples, self.kind, self.split, self.looped = len(sample), kind, sample.split, looped


def fisher(  # noqa: PLR0913 - options by keyword
    model: nn.Module, task: Task, recipe: str | Term | Recipe | None = None, delta: Delta | None = None,
    examples: int = 1024, kind: str = "empirical", *, split: str = "train", seed: int = 0, samples: int = 1,
    sigma: float = 1.0, batch_size: int = 32, max_length: int | None = None,
    processor: Processor | None = None, tokenizer: Processor | None = None, pooling: str | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Measured:  # fmt: skip
    """Diagonal Fisher information: the mean over examples of the squared gradient of an example's log-probability.

        F = 1/N sum_n (d log p(y_n | x_n) / d theta)^2       Sung et al. 2021 (FISH mask), arXiv:2111.09839, section 3

    An example's log-probability is the sum over its labelled tokens. The model comes back bit for bit.

    Args:
        recipe: what would be trained, head apart, nothing narrowed; None for what the delta trained, or all norms.
        delta: take the information at this trained point instead of the base.
        examples: number of examples, a choice by `seed`; all if there are fewer.
        kind: "empirical" (the labels), "true" (labels drawn from the model) or "expected" (sum over all classes).
        samples: draws per example of kind "true".
        sigma: standard deviation of a regression's label around the model's output.
        batch_size: examples at a time; the result does not depend on it.
        processor: makes the model's inputs, by default the one of its name; `tokenizer` is another name of it.
        pooling: as in `attach`.
        chunk_bytes: most bytes for per-example gradients of a matrix.

    Returns:
        Saved name -> float32 tensor (float64 on a float64 base) of the values' shape, with `.examples` and `.looped`.

    Raises:
        DataError: an option out of range, labels that do not fit the head, active dropout, values that are not finite.
        PlanError, AttachError, DeltaError: nothing but the head is trained, something is attached, another base.
    """
    max_length = length_of(delta, task, max_length)
    model = bare(model)
    check_still(model)
    processor = given_processor(processor, tokenizer) or processor_of(model, task.task_kind)
    with at_point(model, recipe, delta, pooling, seed) as placed:
        return attached_fisher(
            placed, task, examples, kind, split=split, seed=seed, samples=samples, sigma=sigma, batch_size=batch_size,
            max_length=max_length, processor=processor, chunk_bytes=chunk_bytes,
        )  # fmt: skip


def attached_fisher(  # noqa: PLR0913 - options by keyword
    model: nn.Module,
    data: Task | Sample,
    examples: int = 1024,
    kind: str = "empirical",
    *,
    split: str = "train",
    seed: int = 0,
    samples: int = 1,
    sigma: float = 1.0,
    batch_size: int = 32,
    max_length: int | None = None,
    processor: Processor | None = None,
    tokenizer: Processor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Measured:
    """`fisher` of what is attached to a model now, where it stands now.

    Args:
        data: a task, or a `Sample`, such as `Sample.of_batch(tensors, kind)`, which takes the place of `examples`,
            `split`, `max_length` and `processor`.

    Raises:
        DataError, AttachError: as `fisher` does.
    """
    model, likelihood = bare(model), Likelihood(data.kind, kind, samples, sigma, seed)
    processor = given_processor(processor, tokenizer)
    sample = _sample(model, data, examples, split, seed, max_length, processor)
    _check_options(model, batch_size, chunk_bytes)
    totals, looped = squared_gradients(model, sample, likelihood, batch_size, chunk_bytes)
    return Measured(totals, sample, kind, looped)


def mean_gradients(  # noqa: PLR0913 - options by keyword
    model: nn.Module,
    task: Task,
    recipe: str | Term | Recipe | None = None,
    delta: Delta | None = None,
    examples: int = 1024,
    *,
    split: str = "train",
    seed: int = 0,
    sigma: float = 1.0,
    batch_size: int = 32,
    max_length: int | None = None,
    processor: Processor | None = None,
    tokenizer: Processor | None = None,
    pooling: str | None = None,
) -> Measured:
    """Mean gradient of the labels' log-probability, with its sign, over the examples that `fisher` takes.

    Returns:
        Saved name -> float32 tensor (float64 on a float64 base) in the shape of the values.

    Raises:
        DataError, PlanError, AttachError, DeltaError: as `fisher` does.
    """
    model = bare(model)
    check_still(model)
    processor = given_processor(processor, tokenizer) or processor_of(model, task.task_kind)
    with at_point(model, recipe, delta, pooling, seed) as placed:
        limit = length_of(delta, task, max_length)
        sample = _sample(placed, task, examples, split, seed, limit, processor)
        return attached_mean_gradients(placed, sample, sigma=sigma, batch_size=batch_size)


def attached_mean_gradients(model: nn.Module, sample: Sample, *, sigma: float = 1.0, batch_size: int = 32) -> Measured:
    """`mean_gradients` of what is attached to a model now. Raises DataError and AttachError as `fisher` does."""
    model = bare(model)
    _check_options(model, batch_size, 1)
    wanted, likelihood = tensors_of(model), Likelihood(sample.kind, sigma=sigma)
    totals = {name: torch.zeros_like(tensor, requires_grad=False) for name, tensor in wanted.items()}
    with frozen(model):
        for places in sample.batches(batch_size):
            for grads in gradients(model, sample, likelihood, places, wanted):
                for name, grad in grads.items():
                    totals[name] += grad
    for name, total in totals.items():
        if not torch.isfinite(total).all():
            raise DataError(
                f"the mean gradient of {name} is not finite; fisher(...) on the same data names the example"
            )
    return Measured(totals, sample, "empirical")


def _sample(
    model: nn.Module, data: Task | Sample, examples: int, split: str, seed: int, max_length: int | None,
    processor: Processor | None,
) -> Sample:  # fmt: skip
    if isinstance(data, Sample):
        return data
    return Sample.of_task(
        data, processor or processor_of(model, data.task_kind), split, examples, seed, max_length, model
    )


def _check_options(model: nn.Module, batch_size: int, chunk_bytes: int) -> None:
    for name, value in (("batch_size", batch_size), ("chunk_bytes", chunk_bytes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataError(f"{name}={value!r} must be a whole number of at least 1")
    check_still(model)
    if not tensors_of(model):
        raise PlanError("what is attached trains nothing but the head, which is left out of the scores; attach LN()")
