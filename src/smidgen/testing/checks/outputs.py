"""Checks of what the model gives."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import nn

from smidgen.common.errors import AttachError
from smidgen.delta.attaching import detach, disabled
from smidgen.delta.merging import merge
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.testing.cases import Case, check, shake
from smidgen.testing.checks.common import equal, hooks, untrained


@check
def starts_as_identity(case: Case) -> None:
    """Attached and untrained, the model does what it did, bit for bit."""
    case.attach()
    equal(case.run(), case.base, "output right after attach")


@check
def acts(case: Case) -> None:
    """With other values in the trained tensors the output changes: every edit fires."""
    model, excused = case.attach(perturb=0.05), untrained(case)
    start = case.run()
    for name, parameter in trained_parameters(model).items():
        if name in excused:
            continue
        before = parameter.detach().clone()
        shake([parameter], 0.5, seed=9)
        assert not torch.equal(case.run(), start), f"changing {name} changes nothing"
        with torch.no_grad():
            parameter.copy_(before)


@check
def disabled_gives_the_base(case: Case) -> None:
    """Inside `disabled` the output is the base's, afterwards the attached one's, bit for bit."""
    model = case.attach(perturb=0.3)
    with torch.no_grad():
        for name, _ in attachment(model).plan.head:  # the head stands apart
            trained_parameters(model)[name].copy_(dict(attachment(model).base_tensors(model))[name])
    before = case.run()
    with disabled(model):
        equal(case.run(), case.base, "output inside disabled")
    equal(case.run(), before, "output after disabled")


@check
def merges(case: Case) -> None:
    """Merged equals attached, in a plain model; or the merge is refused."""
    model = case.attach(perturb=0.1)
    added = [entry for entry in attachment(model).plan.entries if entry.added]
    if any(entry.method.unmergeable(entry.site) for entry in added):
        try:
            merge(model)
        except AttachError:
            return
        raise AssertionError("merge went through although the method says that it is not mergeable")
    merged = merge(model)
    assert type(merged) is type(model) and hooks(merged) == 0, "the merged model is not plain"
    torch.testing.assert_close(case.run(merged), case.run(), rtol=1e-9, atol=1e-9)


@check
def compiled_sees_attach_and_detach(case: Case) -> None:
    """On a frozen model that was compiled and run before: attach and detach show. (On a trainable one, the guards on
    requires_grad hide the fault.)"""
    case.model.requires_grad_(False)
    compiled = cast(nn.Module, torch.compile(case.model, backend="eager"))
    same = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    same(case.run(compiled), case.base)
    case.attach(perturb=0.3)
    same(case.run(compiled), case.run())
    assert not torch.allclose(case.run(compiled), case.base), "the compiled model does not see the edits"
    detach(case.model)
    same(case.run(compiled), case.base)


@check
def casting_is_refused(case: Case) -> None:
    """A cast of the attached model, which would ruin the masters, is an error at the next forward."""
    case.attach().half()
    try:
        case.run()
    except AttachError:
        return
    raise AssertionError("the attached model was cast to float16 and nobody noticed")
