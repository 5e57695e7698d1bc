"""Checks of what trains."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.func import functional_call

from smidgen.delta.attaching import attach, detach
from smidgen.delta.merging import folded
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.steps.gradient_checks import still
from smidgen.steps.optimizer_groups import optimizer
from smidgen.testing.cases import Case, check
from smidgen.testing.checks.common import equal, untrained


@check
def trains_only_what_it_says(case: Case) -> None:
    """Exactly the plan's tensors and the head require a gradient; everything else is frozen."""
    model = case.attach()
    wanted = {id(p) for p in trained_parameters(model).values()}
    found = {id(p) for p in model.parameters() if p.requires_grad}
    assert wanted == found, f"{len(found - wanted)} tensors train unasked, {len(wanted - found)} do not train"


@check
def gradient_reaches_every_tensor(case: Case) -> None:
    """Every trained tensor has a non-zero gradient, unless its method says why not."""
    model = case.attach(perturb=0.1)
    case.loss().backward()
    excused = untrained(case)
    for name, p in trained_parameters(model).items():
        assert p.grad is not None, f"{name} has no gradient"
        assert name in excused or float(p.grad.abs().max()) > 0, f"the gradient of {name} is zero"


@check
def gradients_are_those_of_the_merged_weight(case: Case) -> None:
    """Where `merge` says what the weights become, gradients are autograd's through these weights in a plain model."""
    model = case.attach(perturb=0.1).eval()
    if any(entry.added and entry.method.unmergeable(entry.site) for entry in attachment(model).plan.entries):
        return
    trained = trained_parameters(model)
    case.loss().backward()
    found = {name: p.grad for name, p in trained.items()}
    values, plain = folded(model), copy.deepcopy(model)
    detach(plain)
    logits = functional_call(plain, values, kwargs=case.inputs).logits
    wanted = torch.autograd.grad(case.loss(logits), list(trained.values()), allow_unused=True)
    for (name, p), through in zip(trained.items(), wanted, strict=True):
        pair = [torch.zeros_like(p) if g is None else g for g in (found[name], through)]
        worst = float((pair[0] - pair[1]).abs().max() / pair[1].abs().max().clamp(min=1))
        assert worst < 1e-9, f"the gradient of {name} is off by {worst:.2g}, relative to its largest value"


@check
def every_tensor_moves(case: Case) -> None:
    """Three AdamW steps move every trained tensor, and nothing else."""
    model = case.attach()
    start = {n: p.detach().clone() for n, p in trained_parameters(model).items()}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    case.step(3, lr=1e-3)
    assert not still(model, start), f"{still(model, start)[0]} did not move"
    for name, p in model.named_parameters():
        if name in frozen:
            equal(p.detach(), frozen[name], f"frozen {name}")


@check
def trains_in_bfloat16(case: Case) -> None:
    """On a bfloat16 base: close to it at the start, float32 masters, and steps of 1e-3 move every value of a vector."""
    case.model.to(torch.bfloat16)
    dtype, base = torch.bfloat16, case.run()
    if any("starts_as_identity" in getattr(term, "exceptions", {}) for term in case.recipe):
        base = _exact(case)
    model = case.attach()
    attached = case.run()
    assert attached.dtype == dtype, f"the output is {attached.dtype}"
    scale = base.float().abs().max()
    worst = float((attached.float() - base.float()).abs().max() / scale)
    assert worst < 0.05, f"the start is off by {worst:.3f} of the largest logit"
    start = {n: p.detach().clone() for n, p in trained_parameters(model).items()}
    wrong = [n for n, p in start.items() if p.dtype != torch.float32]
    assert not wrong, f"{wrong[:1]} is not a float32 master"
    case.step(3, lr=1e-3)
    excused = untrained(case)
    for name, p in trained_parameters(model).items():
        moved = float((p.detach() != start[name]).float().mean())
        assert name in excused or p.ndim > 1 or moved > 0.99, f"only {moved:.0%} of {name} moved"


def _exact(case: Case) -> Tensor:
    """What the attached model gives at its start in double precision."""
    twin = attach(copy.deepcopy(case.model).double(), case.recipe, seed=case.seed)
    return case.run(twin)


@check
def checkpointing_gives_equal_gradients(case: Case) -> None:
    """Gradients are the same under gradient checkpointing."""
    model = case.attach(perturb=0.1).train()
    case.loss().backward()
    plain = {n: p.grad.clone() for n, p in trained_parameters(model).items() if p.grad is not None}
    model.zero_grad()
    model.activation_checkpointing_enable()  # type: ignore[operator]
    case.loss().backward()
    for name, p in trained_parameters(model).items():
        assert p.grad is not None, f"{name} has no gradient under checkpointing"
        torch.testing.assert_close(p.grad, plain[name], rtol=1e-9, atol=1e-12)


@check
def optimiser_covers_every_tensor(case: Case) -> None:
    """`optimizer(model)` holds each trained tensor exactly once, without decay."""
    model = case.attach()
    groups = optimizer(model).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    wanted = [id(p) for p in trained_parameters(model).values()]
    assert sorted(held) == sorted(wanted), f"the optimiser holds {len(held)} tensors, {len(wanted)} are trained"
    assert all(group["weight_decay"] == 0 and group["lr"] > 0 for group in groups), "decay is on, or a rate is 0"
