"""Different recipes in one batch: each row has what its own delta gives alone, the base's rows among them."""

import itertools

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import AttachError, DeltaError
from smidgen.ports.attachment_record import trained_parameters
from smidgen.ports.by_row import in_place_terms, module_layouts
from smidgen.ports.forward_state import mixed
from smidgen.serving.served_model import ServedModel
from smidgen.testing.cases import shake
from tests import helpers as h

MODELS = {"bert": h.bert, "llama": h.causal, "gpt2": lambda: h.causal("gpt2")}
RECIPES = [
    "LN()",
    "LN(which='attention')",
    "LN(layers='top:1') | Select('magnitude', keep=0.5)",
    "LoRA(rank=2)",
    "LoRA(rank=3, target='linear') + LN()",
    "LoRA(rank=2) | Select('random', keep=0.5)",
    "IA3()",
    "SSF()",
    "Adapter(width=2)",
    "Adapter(width=2, form='parallel')",
    "Prefix(length=3)",
    "Prefix(length=1) + LN()",
    "LoFiT()",
]
PROMPTS = ["PromptTuning(length=3)", "PromptTuning(length=3) + LN()"]
REFUSED = {
    "Full()": "trained in place",
    "DoRA(rank=2)": "reads the weight|more than its trained tensors",
    "MoS(rank=2)": "share tensors",
}


def trained(model, recipe, seed=0, **options):
    sm.attach(model, recipe, **options)
    shake(trained_parameters(model).values(), 0.3, seed=seed)
    return sm.detach(model)


def alone(model, delta, batch, row):
    one = {k: v[row : row + 1] for k, v in batch.items()}
    if delta is None:
        return model(**one).logits[0]
    with sm.attached(model, delta):
        return model(**one).logits[0]


def largest(served, model, deltas, batch):
    """The largest difference over rows, and the smallest between two rows' results on the same text."""
    tenants = [None if d is None else served.tenant(str(i), d) for i, d in enumerate(deltas)]
    order = sorted(range(len(tenants)), key=lambda i: "" if tenants[i] is None else tenants[i].order)
    some = {k: v[:1].expand(len(order), -1) for k, v in batch.items()}
    with torch.no_grad():
        wanted = torch.stack([alone(model, deltas[i], some, row) for row, i in enumerate(order)])
        with mixed(served.mix([tenants[i] for i in order])):
            found = served.model(**some).logits
    pairs = itertools.combinations(range(len(order)), 2)
    return float((found - wanted).abs().max()), min(float((found[a] - found[b]).abs().max()) for a, b in pairs)


@pytest.fixture(params=MODELS)
def case(request):
    model = MODELS[request.param]().double()
    return model, ServedModel(model, h.tokenizer())


@pytest.mark.parametrize("recipes", [[None, *RECIPES, "LN()"], [*PROMPTS, PROMPTS[0]]], ids=["all", "prompts"])
def test_all_recipes_in_one_batch(case, recipes):
    model, served = case
    with h.untouched(model):
        deltas = [None if recipe is None else trained(model, recipe, seed) for seed, recipe in enumerate(recipes)]
        apart, between = largest(served, model, deltas, h.ids(rows=1, mask=False))
    assert apart < 1e-11
    assert between > 1e-5
    served.close()


@pytest.mark.parametrize("pair", list(itertools.combinations(RECIPES, 2)), ids=" and ".join)
def test_all_pairs(pair):
    model = h.bert()
    served = ServedModel(model, h.tokenizer())
    deltas = [trained(model, recipe, seed) for seed, recipe in enumerate(pair)]
    apart, between = largest(served, model, [deltas[1], None, deltas[0]], h.ids(rows=1, mask=False))
    assert apart < 1e-5
    assert between > 1e-5
    served.close()


@pytest.mark.parametrize("name", MODELS)
def test_a_base_in_bfloat16(name):
    model = MODELS[name]().bfloat16()
    served = ServedModel(model, h.tokenizer())
    deltas = [trained(model, recipe, seed) for seed, recipe in enumerate(["LN()", "LoRA(rank=2)", "Prefix(length=2)"])]
    apart, between = largest(served, model, [None, *deltas], h.ids(rows=1, mask=False))
    assert apart < 0.1
    assert between > 1e-3


@pytest.mark.parametrize("recipe", REFUSED)
def test_what_cannot_be_mixed_is_refused_when_it_is_added(recipe):
    model = h.bert()
    served = ServedModel(model, h.tokenizer())
    with pytest.raises(AttachError, match=REFUSED[recipe]):
        served.tenant("one", trained(model, recipe))
    assert largest(served, model, [None, trained(model, "LN()")], h.ids(rows=1, mask=False))[0] < 1e-5


def test_prompts_of_other_lengths_go_one_after_another():
    model = h.bert()
    served = ServedModel(model, h.tokenizer())
    one, other = (served.tenant("x", trained(model, f"PromptTuning(length={n})")) for n in (2, 3))
    assert (one.prompt, other.prompt) == (2, 3)
    with pytest.raises(AttachError, match=r"prompts of \[2, 3\]"), mixed(served.mix([one, other])):
        served.model(**h.ids(rows=2, mask=False))


def test_heads_and_poolings_side_by_side():
    batch = h.ids(rows=1, mask=False)
    models = {n: h.bert(num_labels=n) for n in (2, 5)}
    served = ServedModel(models[2], h.tokenizer())
    for name, weight in models[2].bert.named_parameters():
        models[5].bert.get_parameter(name).data.copy_(weight.data)
    cases = [(2, "mean"), (5, None), (5, "last"), (2, "first"), (2, None)]
    deltas = [trained(models[n], "LN()", seed, pooling=p) for seed, (n, p) in enumerate(cases)]
    tenants = [served.tenant(str(i), delta) for i, delta in enumerate(deltas)]
    some = {k: v.expand(len(cases), -1) for k, v in batch.items()}
    with torch.no_grad(), mixed(served.mix(tenants)):
        found = served.model(**some).logits
    assert found.shape == (len(cases), 5)
    for row, ((n, _), delta) in enumerate(zip(cases, deltas, strict=True)):
        with torch.no_grad():
            wanted = alone(models[n], delta, batch, 0)
        assert torch.allclose(found[row, :n], wanted, atol=1e-5)


def test_another_base_is_refused():
    served = ServedModel(h.bert(), h.tokenizer())
    with pytest.raises(DeltaError, match="base|fingerprint"):
        served.tenant("x", trained(h.bert(seed=7), "LN()"))


def test_an_attached_model_is_refused():
    with pytest.raises(AttachError, match="attached already"):
        ServedModel(sm.attach(h.bert(), "LN()"), h.tokenizer())


BROKEN = {
    "gain left out": (in_place_terms, "terms_by_row", lambda terms, module, args, output: output, "LN()"),
    "edits left out": (module_layouts, "by_block", lambda layouts, place, function, first, *others: first, "LoRA()"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_layout_that_acts_wrongly_is_refused(name, monkeypatch):
    *broken, recipe = BROKEN[name]
    model = h.bert()
    served = ServedModel(model, h.tokenizer())
    delta = trained(model, recipe)
    monkeypatch.setattr(*broken)
    with pytest.raises(AttachError, match="off from what it is alone"):
        served.tenant("one", delta)
