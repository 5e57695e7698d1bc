"""Methods of different ports in one recipe: attached, trained, saved as one delta, reloaded, taken off."""

import json
import sys
from dataclasses import dataclass

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import AttachError, RecipeError
from smidgen.delta.delta import Delta
from smidgen.importance.fisher_information import fisher
from smidgen.importance.sample import Sample
from smidgen.methods.attention.prefix import Prefix
from smidgen.methods.bottleneck.adapter import Adapter
from smidgen.methods.low_rank.dora import DoRA
from smidgen.methods.low_rank.pissa import PiSSA
from smidgen.methods.prompt.prompt_tuning import PromptTuning
from smidgen.methods.scaling.ssf import SSF
from smidgen.ports.attachment_record import trained_parameters
from smidgen.ports.attention_port import AttentionPort
from smidgen.ports.edit import Edit, drop_edits
from smidgen.recipe.named_recipes import NAMED
from smidgen.recipe.recipe import Recipe, Term
from smidgen.studies.experiments.model_components import components, part_of
from smidgen.testing.suite import CHECKS, MODELS, run_check, shake, tiny
from tests import helpers as h
from tests.test_fisher_rules import agree, one_by_one, text_model

attach, place = sys.modules["smidgen.delta.attaching"], sys.modules["smidgen.ports.placement"]
UNIFIED = "LN() + Prefix(length=4) + Adapter(site='attention', width=3)"
EVERYTHING = (
    "PromptTuning(length=2) + LN() + Prefix(length=2, mlp=3) + DoRA(rank=2, target='linear') + PiSSA(rank=2) "
    "+ SSF(norms=False) + Adapter(width=2, form='parallel')"
)
SUMS = (
    UNIFIED,
    EVERYTHING,
    "Prefix(length=2) + Prefix(length=3, layers='top:1')",
    "(Prefix(length=2) + Adapter(width=3) | Select('random', keep=0.5)) + IA3()",
)
QUICK = [c for c in CHECKS if c not in ("docstring_is_true", "compiled_sees_attach_and_detach")]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return h.task(tmp_path_factory.mktemp("films"))


@pytest.mark.parametrize("recipe", SUMS)
@pytest.mark.parametrize("model", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("check", QUICK)
def test_conformance_of_sums(check, model, recipe):
    run_check(check, recipe, model)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", NAMED)
def test_named_recipes_attach_to_every_tiny_model(name, model):
    subject = tiny(model)
    with h.untouched(subject):
        sm.attach(subject, name)
        delta = sm.detach(subject)
    assert delta.recipe == sm.parse(NAMED[name])


def test_a_name_is_a_spelling_of_its_sum():
    for name, spelled in NAMED.items():
        assert sm.parse(name) == sm.parse(spelled)
        assert Recipe.from_json(sm.parse(name).to_json()) == sm.parse(name)
    assert sm.parse("MAM + LN()") == sm.parse("MAM") + sm.LN()
    narrowed = sm.parse("MAM | Select('random', keep=0.5)")
    assert narrowed.whole == sm.parse("MAM")
    with pytest.raises(RecipeError, match="no method is called 'MAMM'; did you mean 'MAM'"):
        sm.parse("MAMM")


@pytest.mark.parametrize("recipe", [UNIFIED, EVERYTHING])
def test_trained_saved_and_reloaded_bit_for_bit(recipe, task, tmp_path):
    model = h.bert(dropout=0.1)
    base = h.logits(model)
    delta = sm.fit(model, recipe, task, tokenizer=h.tokenizer(), epochs=2, batch_size=8, progress=False, out=tmp_path)
    assert torch.equal(h.logits(model), base)
    loaded = Delta.load(tmp_path)
    h.same(delta, loaded)
    with sm.attached(model, loaded):
        trained = h.logits(model)
        h.same(sm.Delta.of(model), delta)
    assert not torch.allclose(trained, base)
    assert torch.equal(h.logits(model), base)
    own = h.bert(dropout=0.1)
    sm.attach(own, loaded)
    assert torch.equal(h.logits(own), trained)


def test_a_network_trains_and_its_result_is_what_was_trained(task, tmp_path):
    recipe, options = "Prefix(length=3, mlp=4)", {"epochs": 2, "batch_size": 8, "progress": False}
    model = h.bert()
    delta = sm.fit(model, recipe, task, tokenizer=h.tokenizer(), out=tmp_path, **options)
    assert delta.info["trained_as"] == recipe
    assert json.loads((tmp_path / "delta.json").read_text())["recipe"][0]["mlp"] is None
    sm.attach(model, delta)
    K = trained_parameters(model)["bert.encoder.layer.0.attention.self.edits.0.K"]
    assert K.shape == (2, 3, 8)


def test_merging_says_of_each_what_cannot_be_and_why():
    model = sm.attach(h.bert(), "LN() + LoRA() + Prefix() + Adapter() + PromptTuning(length=2)")
    with pytest.raises(AttachError) as error:
        sm.merge(model)
    text = str(error.value)
    for part in ("Prefix(): keys", "Adapter(): a bottleneck", "PromptTuning(length=2): tokens"):
        assert part in text
    assert "LoRA" not in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "recipe",
    [
        "Adapter(layers='top:1', width=3)",
        "Prefix(layers='top:1', length=3)",
        "DoRA(layers='top:1', rank=2)",
        "SSF(layers='top:1')",
    ],
)
def test_the_same_delta_with_and_without_the_cache(recipe, task, tmp_path):
    options = {"tokenizer": h.tokenizer(), "epochs": 3, "batch_size": 8, "progress": False, "max_length": 16}
    kept = sm.fit(h.bert(dropout=0.2), recipe, task, out=tmp_path / "run", **options)
    plain = sm.fit(h.bert(dropout=0.2), recipe, task, cache=False, **options)
    for name, tensor in kept.tensors.items():
        torch.testing.assert_close(tensor, plain.tensors[name], rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["chosen"]["cache"] == "on"


@pytest.mark.parametrize(
    ("recipe", "looped"),
    [
        ("Adapter(width=3)", 0),
        ("Adapter(width=3, form='parallel')", 0),
        ("DoRA(rank=2)", 0),
        ("PiSSA(rank=2)", 0),
        ("SSF()", 0),
        ("Prefix(length=2)", 4),
        ("PromptTuning(length=2)", 1),
    ],
)
def test_fisher_information_is_exact(recipe, looped, task):
    model = text_model("bert")
    found = fisher(model, task, recipe, tokenizer=h.tokenizer(), examples=6)
    assert len(found.looped) == looped
    sm.attach(model, recipe)
    agree(found, one_by_one(model, Sample.of_task(task, h.tokenizer(), "train", 6, 0)))


def test_an_analysis_knows_where_added_tensors_belong():
    model = h.bert()
    plan = sm.plan(model, "PromptTuning(length=2) + Prefix(length=2) + Adapter(width=3, site='feed_forward')")
    parts = components(model)
    found = {name: part_of(parts, name)[0] for row in plan.entries for name, _ in row.names()}
    assert {(part.component, part.layer) for name, part in found.items() if name.endswith((".P", ".K", ".D"))} == {
        ("embedding", None), ("attention", 0), ("attention", 1), ("ff out", 0), ("ff out", 1),
    }  # fmt: skip


def test_a_tenth_of_it_is_chosen_by_fisher_information(task):
    recipe = "LN() + Prefix(length=4) + Adapter(site='attention', width=3) | Select('fisher', keep=0.1)"
    delta = sm.fit(h.bert(), recipe, task, tokenizer=h.tokenizer(), epochs=1, progress=False, max_length=16)
    whole = sm.plan(h.bert(), sm.parse(recipe).whole).trained
    assert delta.trained == round(0.1 * whole)


def test_low_precision_trains_together():
    model = h.bert().to(torch.bfloat16)
    sm.attach(model, "MAM + DoRA(rank=2)")
    shake(p for n, p in trained_parameters(model).items() if "edits" in n)
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
    output = model(**h.ids()).logits
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad is not None for p in trained_parameters(model).values())


# The checks of the suite are shown something broken behind each port


@dataclass(frozen=True)
class Lossy(Prefix, abstract=True):
    def settle(self, p, site):
        found = super().settle(p, site)
        return {**found, "K": found["K"] + (self.mlp is not None) * torch.rand(())}


@dataclass(frozen=True)
class Ungrounded(DoRA, abstract=True):
    def from_base(self, p, base, site):
        return dict(p)


@dataclass(frozen=True)
class Unfolded(DoRA, abstract=True):
    def merge(self, p, weight, bias, site):
        return weight + self.scale * p["B"] @ p["A"], bias


@dataclass(frozen=True)
class Restless(PiSSA, abstract=True):
    def after(self, p, x, y, site):
        return y + self.scale * torch.nn.functional.linear(torch.nn.functional.linear(x, p["A"]), p["B"])


@dataclass(frozen=True)
class Shiftless(SSF, abstract=True):
    def merge(self, p, weight, bias, site):
        weight, _ = super().merge(p, weight, bias, site)
        return weight, bias


@dataclass(frozen=True)
class Mute(PromptTuning, abstract=True):
    def tokens(self, p, site):
        return p["P"].detach()


@dataclass(frozen=True)
class Stray(Adapter, abstract=True):
    def after(self, p, x, y, site):
        return super().after({**p, "u": 0 * p["u"]}, x, y, site)


def always_on(monkeypatch):
    monkeypatch.setattr(Edit, "enabled", property(lambda self: True, lambda self, on: None), raising=False)


def keep_configuration(monkeypatch):
    monkeypatch.setattr(AttentionPort, "remove", lambda self, model, site: drop_edits(model.get_submodule(site.path)))


def no_tap_taken(monkeypatch):
    monkeypatch.setattr("smidgen.ports.sublayer_port.drop_tap", lambda module: None)


BROKEN = [
    ("delta_round_trips", Lossy(2, mlp=3), None),
    ("starts_as_identity", Ungrounded(rank=2), None),
    ("merges", Unfolded(rank=2), None),
    ("starts_as_identity", Restless(rank=2), None),
    ("merges", Shiftless(), None),
    ("gradient_reaches_every_tensor", Mute(2), None),
    ("acts", Stray(width=2), None),
    ("disabled_gives_the_base", Prefix(2), always_on),
    ("disabled_gives_the_base", PromptTuning(2), always_on),
    ("detaches_bit_for_bit", Prefix(2), keep_configuration),
    ("detaches_bit_for_bit", Adapter(width=2, form="parallel"), no_tap_taken),
]


@pytest.mark.parametrize(("check", "recipe", "breaker"), BROKEN, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_check_fails_on_something_broken(check, recipe, breaker, monkeypatch):
    monkeypatch.setitem(Term.registry, type(recipe).__name__, type(recipe))
    if breaker is not None:
        run_check(check, recipe, "bert")
        breaker(monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        run_check(check, recipe, "bert")
