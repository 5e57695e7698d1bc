"""Sums of squared per-example gradients: batches through the recorder, an exact loop for what it cannot separate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from smidgen.common.dtypes import LOW
from smidgen.common.errors import DataError
from smidgen.importance.gradient_recorder import Recorder
from smidgen.importance.likelihood import Likelihood, check_fit
from smidgen.importance.per_example_rules import Tensors
from smidgen.importance.sample import Sample
from smidgen.importance.targets import Target, find_targets, tensors_of
from smidgen.ports.attachment_record import attachment

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of a rule, in relative norm; rounding is far below
LOW_TOLERANCE = 0.1


def squared_gradients(
    model: nn.Module, sample: Sample, likelihood: Likelihood, batch_size: int, limit: int
) -> tuple[Tensors, tuple[str, ...]]:
    """Saved name -> sum over the sample of the squared gradient of an attached model; names that took the loop.

    Raises:
        DataError: labels that do not fit the head; a log-probability or gradient that is not finite.
    """
    wanted = tensors_of(model)
    with frozen(model):
        targets, looped = find_targets(model)
        refused = _unseparated(model, sample, likelihood, targets, limit)
        with Recorder((t for t in targets if t not in refused), limit) as recorder:
            for places in sample.batches(batch_size):
                _backward(model, sample, likelihood, recorder, places)
                _check_finite(model, sample, likelihood, recorder, places)
        refused |= recorder.refused
        looped += [name for target in refused for name in target.names.values()]
        totals = recorder.totals | looped_squares(model, sample, likelihood, {n: wanted[n] for n in sorted(looped)})
    return {name: totals[name] for name in wanted}, tuple(sorted(looped))


def looped_squares(
    model: nn.Module,
    sample: Sample,
    likelihood: Likelihood,
    tensors: Mapping[str, nn.Parameter],
    places: Sequence[int] | None = None,
) -> Tensors:
    """The same for some tensors, and for some places in the sample, by autograd, one example at a time."""
    totals: Tensors = {name: torch.zeros_like(tensor, requires_grad=False) for name, tensor in tensors.items()}
    for place in (range(len(sample)) if places is None else places) if tensors else ():
        for grads in gradients(model, sample, likelihood, [place], tensors):
            for name, grad in grads.items():
                _refuse_broken(name, grad, sample.name(place))
                totals[name] += grad.square()
    return totals


def gradients(
    model: nn.Module, sample: Sample, likelihood: Likelihood, places: Sequence[int], tensors: Mapping[str, nn.Parameter]
) -> Iterator[Tensors]:
    """Autograd's own gradients, of each term of the likelihood summed over some examples, in a frozen model."""
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    try:
        terms = terms_of(model, sample, likelihood, places)
        for i, term in enumerate(terms):
            last = i == len(terms) - 1
            found = torch.autograd.grad(term.sum(), list(tensors.values()), retain_graph=not last, allow_unused=True)
            pairs = zip(tensors.items(), found, strict=True)
            yield {name: torch.zeros_like(tensor) if grad is None else grad for (name, tensor), grad in pairs}
    finally:
        for tensor in tensors.values():
            tensor.requires_grad_(False)


def terms_of(model: nn.Module, sample: Sample, likelihood: Likelihood, places: Sequence[int]) -> list[Tensor]:
    """A forward pass, and the terms (B,) of `Likelihood.terms`."""
    inputs, labels = sample.batch(places, next(model.parameters()).device)
    logits: Tensor | None = getattr(sample.task_kind.forward(model, inputs), "logits", None)
    if logits is None:
        raise DataError(f"{type(model).__name__} gives no logits; load it with a head: smidgen.load(name, task=task)")
    names = [sample.name(place) for place in places]
    check_fit(sample.kind, logits, labels, names, sample.width)
    terms = likelihood.terms(logits, labels, [sample.numbers[place] for place in places])
    for term in terms:
        for i in (~torch.isfinite(term)).nonzero().flatten().tolist():
            raise DataError(f"{names[i]} has a log-probability of {term[i].item()}; check its text and the model")
    return terms


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Gradients on, and no parameter takes part in them; flags come back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with torch.enable_grad():
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _backward(
    model: nn.Module, sample: Sample, likelihood: Likelihood, recorder: Recorder, places: Sequence[int], only: int = -1
) -> None:
    """Add a batch's squares to the recorder's totals; with `only`, those of the example at that place in the batch."""
    with recorder.forward(len(places)):
        terms = terms_of(model, sample, likelihood, places)
    for i, term in enumerate(terms):
        loss = term.sum() if only < 0 else term[only]
        if loss.requires_grad:
            loss.backward(retain_graph=i < len(terms) - 1)
        recorder.settle()


def _unseparated(
    model: nn.Module, sample: Sample, likelihood: Likelihood, targets: Sequence[Target], limit: int
) -> set[Target]:
    """Targets whose rule does not give, for one example in a small batch, what autograd gives for it alone.

    Two rows and then three tell outputs that are led by the batch from others. Squares that fell on several examples,
    or on none, differ from autograd's.
    """
    order = [place for places in sample.batches(len(sample)) for place in places]
    places, middle = [order[0], order[len(order) // 2], order[-1]], order[len(order) // 2]
    with Recorder(targets, limit, trial=True) as recorder:
        with recorder.forward(2):
            terms_of(model, sample, likelihood, [order[-1]] * 2)
        _backward(model, sample, likelihood, recorder, places, only=1)
    alone = looped_squares(model, sample, likelihood, tensors_of(model), [middle])
    gaps = {name: float((recorder.totals[name].sqrt() - alone[name].sqrt()).norm()) for name in recorder.totals}
    norms = {name: float(alone[name].sum().sqrt()) for name in recorder.totals}
    low = attachment(model).dtype in LOW
    noise = (2**-7 if low else 4 * torch.finfo(next(iter(alone.values())).dtype).eps) * max(norms.values(), default=0.0)

    def wrong(name: str) -> bool:
        tolerance = LOW_TOLERANCE if low else TOLERANCE[alone[name].dtype]
        return not gaps[name] <= tolerance * norms[name] + noise

    return recorder.refused | {target for target in targets if any(map(wrong, target.names.values()))}


def _check_finite(
    model: nn.Module, sample: Sample, likelihood: Likelihood, recorder: Recorder, places: Sequence[int]
) -> None:
    """Raises DataError, naming tensor and example, if a batch left a total that is not finite."""
    broken = [name for name, total in recorder.totals.items() if not torch.isfinite(total.sum())]
    for name in broken[:1]:
        looped_squares(model, sample, likelihood, {name: tensors_of(model)[name]}, places)
        raise DataError(
            f"the squared gradients of {name} overflow; look at {sample.name(places[0])} and those of its length"
        )


def _refuse_broken(name: str, grad: Tensor, example: str) -> None:
    if not torch.isfinite(grad).all():
        raise DataError(f"the gradient of {name} is not finite at {example}; check its text and the model's values")
