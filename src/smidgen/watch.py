"""Nothing fails in silence: every trained tensor is reached by a gradient and moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from smidgen.attachment import attachment, trained_parameters
from smidgen.errors import DivergedError, TrainError
from smidgen.finite import not_finite


def check_gradients(model: nn.Module, finite: bool = True) -> None:
    """After a backward pass: every trained tensor must have a gradient, and a finite one unless told otherwise.

    Raises:
        TrainError: naming the tensors that the loss does not depend on, or whose gradient is not finite.
    """
    parameters = trained_parameters(model)
    spare = attachment(model).plan.spare
    unreached = [name for name, p in parameters.items() if p.grad is None and name not in spare]
    if unreached:
        raise TrainError(
            f"{len(unreached)} of {len(parameters)} trained tensors got no gradient, first {unreached[0]}: the "
            "forward pass never used them; narrow the recipe (which=, layers=, target=) to what this model runs"
        )
    broken = [n for n, p in parameters.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
    if broken and finite:
        raise TrainError(f"the gradient of {broken[0]} is not finite; lower the learning rate or check the data")


def check_finite(model: nn.Module, step: int) -> None:
    """After an optimiser step: every trained value is finite.

    Raises:
        DivergedError: naming a tensor that is not.
    """
    parameters = trained_parameters(model)
    norms = (
        torch.stack([n.float() for n in torch._foreach_norm(list(parameters.values()))])
        if parameters
        else torch.zeros(1)
    )
    if torch.isfinite(norms).all():
        return
    if found := not_finite({name: p.detach() for name, p in parameters.items()}):
        raise DivergedError(f"after step {step}, {found}; try a lower lr, or look at the data of this step")


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all trained values, to compare with later."""
    return {name: p.detach().clone() for name, p in trained_parameters(model).items()}


def still(model: nn.Module, start: dict[str, Tensor]) -> list[str]:
    """Names of trained tensors that are bit for bit where they were, without a declared reason."""
    excused = set(resting(model))
    now = trained_parameters(model)
    return [n for n, p in now.items() if n not in excused and torch.equal(p.detach(), start[n])]


def check_moved(model: nn.Module, start: dict[str, Tensor], steps: int) -> None:
    """After a few optimiser steps with a learning rate above 0: every trained tensor must have moved.

    Raises:
        TrainError: naming the tensors that stand still.
    """
    names = still(model, start)
    if names:
        raise TrainError(
            f"{len(names)} of {len(start)} trained tensors did not move in {steps} steps, first {names[0]}: is it in "
            "the optimiser (smidgen.optimizer(model)), and is its learning rate above 0?"
        )


def resting(model: nn.Module) -> Iterator[str]:
    """Names of trained tensors that may stand still: by their method's word, chosen values of rows of a table, and what
    is new in the base (a pooler that nothing reads)."""
    yield from attachment(model).plan.spare
    for row in attachment(model).plan.rows:
        for term, name, _ in row.trained():
            # the batch may hold none of the chosen rows of a table; a chosen value of LoRA's A may meet none of B's
            rare = term in row.subsets and (row.added or row.site.kind == "embedding")
            if rare or row.method.may_rest(row.site, term):
                yield name


@contextmanager
def memory_guard(batch_size: int, batch_tokens: int | None = None) -> Iterator[None]:
    """Turn an out-of-memory error into one line that suggests a smaller batch, in rows or in tokens."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error).lower()
        if not isinstance(error, MemoryError) and "out of memory" not in text and "can't allocate memory" not in text:
            raise
        name, size = ("batch_size", batch_size) if batch_tokens is None else ("batch_tokens", batch_tokens)
        unit = "" if batch_tokens is None else " tokens"
        raise TrainError(f"a batch of {size}{unit} does not fit into memory; try {name}={max(1, size // 2)}") from error
