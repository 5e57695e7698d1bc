"""Probe: a ladder side network that reads block outputs of a base run without gradient; without a line in src/."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import PlanError
from smidgen.ports.attachment_record import trained_parameters
from smidgen.recipe.recipe import Term
from smidgen.testing.cases import shake
from tests import helpers as h
from tests.probes.own_ladder import Ladder, by_hand

SOURCE = Path(sm.__file__).parent
Term.registry.pop("Ladder")


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(Term.registry, "Ladder", Ladder)


def models():
    return {"bert": h.bert(), "llama": h.causal(), "gpt2": h.causal("gpt2")}


def blocks_of(model):
    (site,) = sm.plan(model, "Ladder()").entries
    return [model.get_submodule(path) for path in site.site.blocks]


def tapped(model, batch):
    """What enters and leaves the blocks of a plain model."""
    states, handles = [], []
    blocks = blocks_of(model)
    handles.append(blocks[0].register_forward_pre_hook(lambda m, a: states.append(a[0])))
    for block in blocks:
        handles.append(block.register_forward_hook(lambda m, a, o: states.append(o[0] if isinstance(o, tuple) else o)))
    with torch.no_grad():
        model.eval()(**batch)
    for handle in handles:
        handle.remove()
    return states


@pytest.mark.parametrize("name", models())
def test_it_is_what_its_formula_says(name):
    model = models()[name].double()
    states, plain = tapped(model, h.ids()), h.logits(model)
    sm.attach(model, "Ladder()")
    assert torch.equal(h.logits(model), plain), "U is zero: the model as it was"
    values = {n.rpartition(".")[2]: p for n, p in trained_parameters(model).items() if ".edits." in n}
    assert values["I"].abs().sum() > 0, "copies of the blocks"
    shake(trained_parameters(model).values(), 0.1)
    left = []
    handle = blocks_of_attached(model)[-1].register_forward_hook(lambda m, a, o: left.append(o))
    found = h.logits(model)
    handle.remove()
    out = left[0][0] if isinstance(left[0], tuple) else left[0]
    assert torch.allclose(out, by_hand({k: v.detach() for k, v in values.items()}, states), atol=1e-9)
    assert not torch.equal(found, plain)


def blocks_of_attached(model):
    return [model.get_submodule(path) for row in model._smidgen.plan.entries for path in row.site.blocks]


@pytest.mark.parametrize("name", models())
def test_no_gradient_is_kept_for_the_base(name):
    model = sm.attach(models()[name], "Ladder()").train()
    seen = []
    for block in blocks_of_attached(model)[:-1]:
        block.register_forward_hook(lambda m, a, o: seen.append((o[0] if isinstance(o, tuple) else o).requires_grad))
    model(**h.ids()).logits.sum().backward()
    assert seen
    assert not any(seen)
    shake(trained_parameters(model).values(), 0.1)
    model.zero_grad()
    model(**h.ids()).logits.square().sum().backward()
    grads = {n: p.grad for n, p in trained_parameters(model).items()}
    assert all(g is not None and g.abs().sum() > 0 for g in grads.values())


def test_it_trains_saves_and_comes_back(tmp_path):
    model, task = h.bert(), h.task(tmp_path / "task")
    with h.untouched(model):
        delta = sm.fit(
            model, "Ladder()", task, tokenizer=h.tokenizer(), epochs=20, batch_size=8, lr=1e-2, progress=False
        )
    delta.save(tmp_path / "delta")
    with sm.attached(model, sm.Delta.load(tmp_path / "delta")):
        scores = sm.evaluate(model, task, tokenizer=h.tokenizer())
    assert scores.values["accuracy"] > 0.8
    assert sm.fisher(model, task, recipe="Ladder()", tokenizer=h.tokenizer(), examples=4)


def test_what_would_not_learn_is_refused():
    for recipe in ("LN() + Ladder()", "Ladder() + LoRA(rank=2)", "Ladder() + PromptTuning(length=2)"):
        with pytest.raises(PlanError, match="without gradient, so .* would not learn"):
            sm.plan(h.bert(), recipe)
    with pytest.raises(PlanError, match="both take the place"):
        sm.plan(h.bert(), Ladder() + Ladder(reduction=2))


def test_no_line_in_src_knows_it():
    assert not [path for path in SOURCE.rglob("*.py") if "Ladder" in path.read_text()]
