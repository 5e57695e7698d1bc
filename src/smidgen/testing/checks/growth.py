"""Checks of methods whose tensors are replaced by larger ones in training."""

from __future__ import annotations

import tempfile

import torch

from smidgen.delta.attaching import attach, detach
from smidgen.delta.delta import Delta
from smidgen.methods.capabilities import Grows
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.steps.growth import after_step
from smidgen.steps.optimizer_groups import optimizer
from smidgen.testing.cases import Case, check
from smidgen.testing.checks.common import equal

STEPS = 20


@check
def grows_and_keeps_its_function(case: Case) -> None:
    """Events change no output; afterwards every tensor trains, and the delta comes back with the larger shapes."""
    if not any(isinstance(term, Grows) for term in case.recipe):
        return
    model = case.attach(perturb=0.1)
    adam = optimizer(model, lr=1e-3, head_lr=1e-3)
    _step(case, adam)
    planned, before = attachment(model).plan.trained, case.run()
    grew = [after_step(model, adam, step, STEPS) for step in range(1, STEPS + 1)]
    assert any(grew), f"no event of {STEPS} steps changed a shape"
    torch.testing.assert_close(case.run(), before, rtol=1e-9, atol=1e-9)
    head = {name for name, _ in attachment(model).plan.head}
    found = sum(p.numel() for name, p in trained_parameters(model).items() if name not in head)
    assert attachment(model).plan.trained == found > planned, "the plan does not count what grew"
    start = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
    held = [id(p) for group in adam.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, trained_parameters(model).values())), "the optimiser holds other tensors"
    for _ in range(3):
        _step(case, adam)
    for name, p in trained_parameters(model).items():
        still = int((p.detach() == start[name]).sum())
        assert still == 0, f"{still} values of {name} stand still after growth"
    _returns(case)


def _step(case: Case, adam: torch.optim.Optimizer) -> None:
    adam.zero_grad()
    case.model.train()
    case.loss().backward()
    adam.step()


def _returns(case: Case) -> None:
    trained, delta = case.run(), detach(case.model)
    equal(case.run(), case.base, "output after detach")
    with tempfile.TemporaryDirectory() as folder:
        loaded = Delta.load(delta.save(folder))
    attach(case.model, loaded)
    equal(case.run(), trained, "output after loading what grew")
