"""Events at optimiser steps: tensors grow, the optimiser's state follows, runs resume; and phases that choose heads."""

from itertools import pairwise

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import PlanError, TrainError
from smidgen.methods.low_rank.triadapt import TriAdaptLoRA
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.steps.growth import after_step, assign, follow
from smidgen.steps.penalties import penalty
from smidgen.testing.cases import inputs_for, shake, tiny


def test_the_core_is_two_triangles_of_blocks():
    method = TriAdaptLoRA(rank=4, start=1, growth=2)
    sizes = [(1, 1), (2, 3), (2, 5)]
    L = [torch.randn(a, s, dtype=torch.float64) for a, s in sizes]
    U = [torch.randn(s, a, dtype=torch.float64) for a, s in sizes]
    wanted = torch.zeros(5, 5, dtype=torch.float64)
    for (a, s), lower, upper in zip(sizes, L, U, strict=True):
        wanted[s - a : s, :s] += lower
        wanted[:s, s - a : s] += upper
    p = {"A": torch.zeros(5, 7), "L": torch.cat([t.flatten() for t in L]), "U": torch.cat([t.flatten() for t in U])}
    assert torch.equal(method.core(p), wanted)
    assert not torch.equal(method.core({**p, "L": p["U"], "U": p["L"]}), wanted)


def test_state_follows_its_parameter_into_the_corner():
    old, new = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4, 3))
    adam = torch.optim.AdamW([{"params": [old], "lr": 0.1}])
    old.grad = torch.randn(2, 3)
    adam.step()
    before = {k: v.clone() for k, v in adam.state[old].items()}
    follow(adam, old, new)
    state = adam.state[new]
    assert old not in adam.state
    assert adam.param_groups[0]["params"] == [new]
    assert torch.equal(state["exp_avg"][:2], before["exp_avg"])
    assert not state["exp_avg"][2:].any()
    assert torch.equal(state["exp_avg_sq"][:2], before["exp_avg_sq"])
    torch.testing.assert_close(state["exp_avg_sq"][2:], before["exp_avg_sq"].mean().expand(2, 3))
    assert state["step"] == before["step"]
    new.grad = torch.ones(4, 3)
    adam.step()


def test_the_maps_that_gain_most_grow_and_the_total_is_reached():
    model, total = sm.attach(tiny("bert"), "TriAdaptLoRA(rank=4, start=1, growth=1)"), 40
    adam, history = sm.optimizer(model), []
    with torch.no_grad():
        strong = next(m for n, m in model.named_modules() if n.endswith("layer.1.attention.self.value.edits.0"))
        strong.L += 5
    for step in range(1, total + 1):
        after_step(model, adam, step, total)
        history.append({n: len(t) for n, t in trained_parameters(model).items() if n.endswith(".A")})
    first = next(ranks for ranks in history if sum(ranks.values()) > 4)
    assert [n for n, r in first.items() if r > 1] == ["bert.encoder.layer.1.attention.self.value.edits.0.A"]
    assert sum(history[-1].values()) == 4 * 4
    assert all(sum(a.values()) <= sum(b.values()) for a, b in pairwise(history))


def test_trained_values_match_the_closed_form_after_growth():
    model, total = sm.attach(tiny("bert"), "TriAdaptLoRA(rank=4, start=2, growth=2, target='query')"), 20
    adam = sm.optimizer(model)
    for step in range(1, total + 1):
        after_step(model, adam, step, total)
    r, a, width = 4, 2, 32  # both of two maps are at their final rank: r (in + out) + r (r + a) each
    assert attachment(model).plan.trained == 2 * (r * 2 * width + r * (r + a))


def test_values_that_events_cannot_lead_to_are_refused():
    model = sm.attach(tiny("bert"), "TriAdaptLoRA(rank=4) + LN()")
    name = next(n for n in trained_parameters(model) if n.endswith(".A"))
    with pytest.raises(TrainError, match="cannot have tensors of the shapes"):
        assign(model, {name: torch.zeros(3, 5)})


def test_a_part_of_what_grows_cannot_be_kept():
    with pytest.raises(PlanError, match="grows while it trains"):
        sm.plan(tiny("bert"), "TriAdaptLoRA(rank=4) | Select('random', keep=0.5)")


def test_penalties_are_added_up():
    model = sm.attach(tiny("bert"), "LoFiT(form='gain', l1=0.5) + LN()")
    assert float(penalty(model).detach()) == 0
    shake(trained_parameters(model).values())
    gains = [t for n, t in trained_parameters(model).items() if n.endswith(".A")]
    torch.testing.assert_close(penalty(model), 0.5 * sum(t.abs().sum() for t in gains))
    sm.detach(model)
    assert penalty(sm.attach(model, "LN() + LoFiT()")) is None


def test_the_first_phase_finds_the_heads_that_a_teacher_changed():
    inputs, planted = inputs_for("bert"), {(0, 1), (0, 3), (1, 2)}
    teacher = sm.attach(tiny("bert"), "LoFiT(form='gain')")
    gains = {n: t for n, t in trained_parameters(teacher).items() if n.endswith(".A")}
    with torch.no_grad():
        for layer, head in planted:
            next(t for n, t in gains.items() if f"layer.{layer}." in n)[8 * head : 8 * head + 8] = 1.5
    wanted = teacher.eval()(**inputs).logits.detach()
    student = sm.attach(tiny("bert"), "LoFiT(form='gain', l1=0.0001)")
    for name in ("classifier.weight", "classifier.bias"):
        trained_parameters(student)[name].requires_grad_(False)
    adam = torch.optim.Adam([t for n, t in trained_parameters(student).items() if n.endswith(".A")], lr=0.02)
    for _ in range(200):
        adam.zero_grad()
        loss = (student(**inputs).logits - wanted).square().mean() + penalty(student)
        loss.backward()
        adam.step()
    found = {}
    for name, t in trained_parameters(student).items():
        if name.endswith(".A"):
            layer = int(name.split("layer.")[1].split(".")[0])
            found |= {(layer, head): float(part.square().sum()) for head, part in enumerate(t.detach().split(8))}
    top = set(sorted(found, key=found.get, reverse=True)[:3])
    assert len(top & planted) >= 2, found
