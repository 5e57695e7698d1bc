"""Checks that the base stays what it was."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from smidgen.delta.attaching import detach
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.testing.cases import Case, check, shake
from smidgen.testing.checks.common import equal, hooks


@check
def base_names_kept(case: Case) -> None:
    """The state_dict keeps the base's names; added ones contain `.edits.` or `.subsets.`."""
    before = list(case.model.state_dict())
    after = list(case.attach().state_dict())
    lost = [name for name in before if name not in after]
    odd = [name for name in after if name not in before and not {"edits", "subsets"} & set(name.split("."))]
    assert not lost and not odd, f"lost {lost[:2]}, unexpected {odd[:2]}"


@check
def mode_is_left_alone(case: Case) -> None:
    """Train or eval mode stays as it was on every module."""
    case.model.train()
    case.model.get_submodule(next(n for n, _ in case.model.named_modules() if n)).eval()
    before = {name: module.training for name, module in case.model.named_modules()}
    case.attach()
    changed = [n for n, m in case.model.named_modules() if n in before and m.training != before[n]]
    assert not changed, f"mode changed at {changed[:2]}"


@check
def detaches_bit_for_bit(case: Case) -> None:
    """After use, the very Parameter objects, their bits and flags, the names and the hooks are as before."""
    model = case.model
    model.get_parameter(next(iter(dict(model.named_parameters())))).requires_grad_(False)
    with unchanged(model):
        case.attach(perturb=0.3)
        case.loss().backward()
        detach(model)
    equal(case.run(), case.base, "output after detach")


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that a model is the same, object for object and bit for bit, after the block."""
    before = {n: (p, p.detach().clone(), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)}
    names, placed = list(model.state_dict()), hooks(model)
    attributes = {n: sorted(m.__dict__) for n, m in model.named_modules()}
    yield
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before) and list(model.state_dict()) == names, "names changed"
    for name, (parameter, value, flag) in before.items():
        assert after[name] is parameter, f"{name} is another Parameter object"
        equal(parameter.detach(), value, name)
        assert parameter.requires_grad == flag, f"requires_grad of {name} is now {not flag}"
    assert hooks(model) == placed, "hooks were left behind"
    left = [n for n, m in model.named_modules() if sorted(m.__dict__) != attributes[n]]
    assert not left, f"attributes were left on {left[:2]}"


@check
def deepcopy_is_independent(case: Case) -> None:
    """A deep copy does the same, and changing it leaves the original alone."""
    model = case.attach(perturb=0.3)
    before, twin = case.run(), copy.deepcopy(model)
    equal(case.run(twin), before, "output of the copy")
    head = {name for name, _ in attachment(twin).plan.head}
    edited = {n: p for n, p in trained_parameters(twin).items() if n not in head}
    shake((edited or trained_parameters(twin)).values(), 1.0)
    assert not torch.equal(case.run(twin), before), "the copy does not use its own tensors"
    equal(case.run(), before, "output of the original after changing the copy")
    detach(twin)
    equal(case.run(twin), case.base, "output of the copy after detach")


@check
def pickles(case: Case) -> None:
    """torch.save and load give a model that does the same and can be detached."""
    model, buffer = case.attach(perturb=0.3), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    equal(case.run(twin), case.run(), "output of the unpickled model")
    detach(twin)
    equal(case.run(twin), case.base, "output of the unpickled model after detach")
