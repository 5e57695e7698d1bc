"""One method of each port with one of every other, and threes: attached, reached, reloaded, merged, taken off."""

import random
import sys
from dataclasses import dataclass, replace
from itertools import combinations

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import AttachError, PlanError
from smidgen.methods.prompt.prompt_tuning import PromptTuning
from smidgen.ports import module_edits
from smidgen.ports import module_port as ports
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.ports.base import Port
from smidgen.recipe.recipe import Term
from smidgen.testing.checks.common import untrained
from smidgen.testing.suite import MODELS, case, run_check
from tests import helpers as h

attach, merging = sys.modules["smidgen.delta.attaching"], sys.modules["smidgen.delta.merging"]
PARTS = {
    "norms": "LN()",  # parameter port
    "biases": "BitFit()",
    "subset": "(LN(which='output') | Select('magnitude', keep=0.5))",  # subset port
    "subset of added": "(LoRA(rank=2, target='ff_in') | Select('random', keep=0.5))",
    "after": "LoRA(rank=2)",  # module port
    "after, norms too": "SSF()",
    "before": "IA3()",
    "reads the base": "DoRA(rank=2)",
    "keeps its start": "PiSSA(rank=2)",
    "sequential": "Adapter(width=2)",  # sublayers
    "parallel": "Adapter(width=2, form='parallel')",
    "keys": "Prefix(length=2)",  # attention port
    "tokens": "PromptTuning(length=2)",  # input port
}
IN_PLACE = ("norms", "biases", "subset")
NO_BIASES = ("llama", "t5")


def refusal(names, model):
    """Why a sum is refused before anything is touched, as a regular expression; None if it is not."""
    if "biases" in names and model in NO_BIASES:
        return r"BitFit\(\) matches no site"
    if sum(name in IN_PLACE for name in names) > 1:
        return "would be trained twice"
    rank = {name: place for place, name in enumerate(names)}
    shifts, reads = rank.get("after, norms too"), rank.get("reads the base")
    if model in NO_BIASES and shifts is not None and reads is not None and shifts < reads:
        return r"DoRA\(rank=2\) reads the weight at .* SSF\(\) cannot be folded in .*; write DoRA\(rank=2\) first"
    return None


def drawn(size, number=None):
    """Names in an order drawn anew for each model, so that both orders of a pair occur; a sample, or all."""
    generator = random.Random(0)
    for model in MODELS:
        every = list(combinations(PARTS, size))
        for names in generator.sample(every, number or len(every)):
            yield model, tuple(generator.sample(names, size))


def sum_of(names):
    return " + ".join(PARTS[name] for name in names)


def reached(subject):
    """Every trained tensor gets a gradient that is not zero, unless its method says why."""
    subject.loss().backward()
    excused = untrained(subject)
    for name, p in trained_parameters(subject.model).items():
        assert p.grad is not None, f"{name} has no gradient"
        assert name in excused or p.grad.abs().max() > 0, f"the gradient of {name} is zero"


def merged(subject):
    """What is merged does the same, or is refused with the reason of each method."""
    reasons = {}
    for row in attachment(subject.model).plan.entries:
        if row.added and (why := row.method.unmergeable(row.site)):
            reasons.setdefault(row.method, why)
    if not reasons:
        torch.testing.assert_close(subject.run(sm.merge(subject.model)), subject.run(), rtol=1e-9, atol=1e-9)
        return
    with pytest.raises(AttachError) as caught:
        sm.merge(subject.model)
    assert [why for method, why in reasons.items() if f"{method}: {why}" not in str(caught.value)] == []


def holds(recipe, model, folder):
    """All that is asked of a sum, on one tiny model in double precision."""
    subject = case(recipe, model)
    with h.untouched(subject.model):
        subject.attach(perturb=0.3)
        reached(subject)
        trained = subject.run()
        assert not torch.allclose(trained, subject.base)
        merged(subject)
        delta = sm.detach(subject.model)
    assert torch.equal(subject.run(), subject.base)
    loaded = sm.Delta.load(delta.save(folder))
    h.same(delta, loaded)
    with h.untouched(subject.model), sm.attached(subject.model, loaded):
        assert torch.equal(subject.run(), trained), "reloaded, it does something else"
    assert torch.equal(subject.run(), subject.base)


@pytest.mark.parametrize(("model", "names"), list(drawn(2)), ids=str)
def test_pairs(model, names, tmp_path):
    if reason := refusal(names, model):
        with pytest.raises(PlanError, match=reason):
            case(sum_of(names), model).attach()
    else:
        holds(sum_of(names), model, tmp_path)


@pytest.mark.parametrize(("model", "names"), [d for d in drawn(3, 16) if not refusal(d[1], d[0])], ids=str)
def test_threes(model, names, tmp_path):
    holds(sum_of(names), model, tmp_path)


def test_pairs_of_every_port_are_tried_in_both_orders():
    tried = {names for model, names in drawn(2) if not refusal(names, model)}
    assert len({frozenset(names) for names in tried}) == len(list(combinations(PARTS, 2))) - 3  # in place twice
    assert sum((b, a) in tried for a, b in tried) > len(tried) / 2
    assert len([d for d in drawn(3, 16) if not refusal(d[1], d[0])]) >= 32


TWICE = (
    "LN()",
    "BitFit()",
    "BitFit(norms=False)",
    "Full()",
    "(Full() | Select('random', keep=0.5))",
)  # but 1st and 3rd
FOLDED = (*TWICE, "LoRA(rank=2)", "PiSSA(rank=2)", "MoS(rank=3)", "TriAdaptLoRA(rank=2)", "IA3()", "SSF()", "LoFiT()")
READS = "DoRA(rank=2, target=('query', 'value', 'ff_out'))"


def folded_pairs():
    """Methods that fold, two by two, in an order drawn anew; what reads the weight, before and behind each."""
    generator = random.Random(0)
    for model in ("bert", "gpt2"):
        yield from ((model, READS, other) for other in FOLDED)
        yield from ((model, other, READS) for other in FOLDED)
    for pair in combinations(FOLDED, 2):
        if pair == (TWICE[0], TWICE[2]) or not set(pair) <= set(TWICE):
            yield ("gpt2", *generator.sample(pair, 2))


@pytest.mark.parametrize(("model", "one", "two"), list(folded_pairs()), ids=str)
def test_gradients_of_pairs_are_those_of_the_merged_weight(model, one, two):
    run_check("gradients_are_those_of_the_merged_weight", f"{one} + {two}", model)


# What is asked is shown something broken


@dataclass(frozen=True)
class Mute(PromptTuning, abstract=True):
    def tokens(self, p, site):
        return p["P"].detach()


def mute(monkeypatch):
    monkeypatch.setitem(Term.registry, "PromptTuning", Mute)


def the_other_way_round(monkeypatch):
    def reverse(module, args, output):
        for edit in reversed(module.edits.values()):
            output = edit.after(args[0], output)
        return output

    monkeypatch.setattr(module_edits, "run_after", reverse)


def rounded(monkeypatch):
    load = sm.Delta.load

    def coarse(folder):
        found = load(folder)
        return replace(found, tensors={n: t.bfloat16().to(t.dtype) for n, t in found.tensors.items()})

    monkeypatch.setattr(sm.Delta, "load", coarse)


def tap_left(monkeypatch):
    monkeypatch.setattr("smidgen.ports.sublayer_port.drop_tap", lambda module: None)


def half_folded(monkeypatch):
    fold = ports.fold
    monkeypatch.setattr(ports, "fold", lambda e, w, b: (w, b) if "IA3" in str(e.method) else fold(e, w, b))


def merges_anything(monkeypatch):
    monkeypatch.setattr(merging, "_refuse", lambda model, record: None)
    monkeypatch.setattr(ports, "fold", lambda edit, weight, bias: (weight, bias))
    monkeypatch.setattr(Port, "folded", lambda self, model, path: {})


def refuses_the_first_only(monkeypatch):
    def refuse(model, record):
        row = next(row for row in record.plan.entries if row.added)
        raise AttachError(f"{row.method}: {row.method.unmergeable(row.site)}")

    monkeypatch.setattr(merging, "_refuse", refuse)


BROKEN = [
    (mute, ("norms", "tokens"), "has no gradient"),
    (the_other_way_round, ("after", "after, norms too"), "not close"),
    (half_folded, ("after", "before"), "not close"),
    (merges_anything, ("norms", "sequential"), "DID NOT RAISE"),
    (refuses_the_first_only, ("keys", "sequential"), "a bottleneck"),
    (rounded, ("norms", "keys"), "differs by"),
    (tap_left, ("norms", "parallel"), r"query\.tap"),
]


@pytest.mark.parametrize(("breaker", "names", "said"), BROKEN, ids=lambda x: getattr(x, "__name__", ""))
def test_something_broken_is_seen(breaker, names, said, monkeypatch, tmp_path):
    holds(sum_of(names), "bert", tmp_path / "whole")
    breaker(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception), match=said):
        holds(sum_of(names), "bert", tmp_path / "broken")
