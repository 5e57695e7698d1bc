"""Adapters: where a sublayer begins and ends, the formula, counts, and what they compose with."""

import copy
import math

import pytest
import torch
import transformers as T
from torch import nn

import smidgen as sm
from smidgen.common.errors import AttachError, PlanError, RecipeError
from smidgen.ports.attachment_record import trained_parameters
from smidgen.ports.forward_state import state
from smidgen.ports.tap import Tap
from smidgen.sites.sublayers import find_sublayers
from smidgen.testing.suite import CHECKS, MODELS, SLOW, case, run_check, shake, tiny
from tests import helpers as h
from tests.architectures import CASES

RECIPES = (
    "Adapter(site='feed_forward', form='parallel', scale=4.0, activation='relu')",
    "Adapter(site='attention', form='parallel', width=3) + Adapter(width=2, layers='top:1') + LoRA(target='ff_out')",
)
PAIRS = [(c, m) for c in CHECKS for m in MODELS if (c, m) not in SLOW]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("check", "model"), [pair for pair in PAIRS if pair[0] != "docstring_is_true"])
def test_conformance(check, model, recipe):
    run_check(check, recipe, model)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("bert-base", (12, 0, 12)),
        ("distilbert", (6, 0, 6)),
        ("deberta-v3-base", (12, 0, 12)),
        ("albert-base", (1, 0, 1)),
        ("modernbert-base", (22, 0, 22)),
        ("xlnet-base", (0, 0, 12)),  # its attention holds 3-D parameters, but is no mixture of experts
    ],
)
def test_every_block_has_its_sublayers(name, counts):
    model = CASES[name].build()
    sites = find_sublayers(model)
    kinds = ("attention", "cross_attention", "feed_forward")
    assert tuple(sum(s.kind == kind for s in sites) for kind in kinds) == counts
    width = model.config.hidden_size
    assert all(site.entry != site.path for site in sites)
    for site in sites:
        assert (site.width_in, site.width_out) == (width, width)


def test_an_encoder_decoder_has_cross_attention():
    kinds = [s.kind for s in find_sublayers(tiny("t5"))]
    assert kinds == ["attention", "feed_forward"] * 2 + ["attention", "cross_attention", "feed_forward"] * 2


class Sublayers(nn.Module):
    """BERT's layer by hand with an adapter after each sublayer, from the model's own maps."""

    def __init__(self, layer, edits, form):
        super().__init__()
        self.layer, self.edits, self.form = layer, edits, form

    def bottleneck(self, p, x, f):
        x = x if self.form == "parallel" else f
        return f + 2.0 * (torch.relu(x @ p["D"].T + p["d"]) @ p["U"].T + p["u"])

    def forward(self, hidden, mask, *args, **kwargs):
        attention, layer = self.layer.attention, self.layer
        mixed = attention.self(hidden, mask)[0]
        f = nn.functional.linear(mixed, attention.output.dense.weight, attention.output.dense.bias)
        middle = attention.output.LayerNorm(self.bottleneck(self.edits[0], hidden, f) + hidden)
        dense = layer.output.dense
        f = nn.functional.linear(layer.intermediate(middle), dense.weight, dense.bias)
        return layer.output.LayerNorm(self.bottleneck(self.edits[1], middle, f) + middle)


@pytest.mark.parametrize("form", ["sequential", "parallel"])
def test_bert_does_what_the_formula_says(form):
    subject = case(f"Adapter(width=3, form={form!r}, scale=2.0, activation='relu')", "bert")
    plain = copy.deepcopy(subject.model)
    found = dict(subject.attach(perturb=0.3).named_modules())
    delta = sm.Delta.of(subject.model)
    for i, layer in enumerate(plain.bert.encoder.layer):
        edits = []
        for path in (f"bert.encoder.layer.{i}.attention.output.dense", f"bert.encoder.layer.{i}.output.dense"):
            assert path in found
            edits.append({s: delta.tensors[f"{path}.edits.0.{s}"] for s in ("D", "d", "U", "u")})
        plain.bert.encoder.layer[i] = Sublayers(layer, edits, form)
    with torch.no_grad():
        for name in delta.head:
            plain.get_parameter(name).copy_(delta.tensors[name])
    torch.testing.assert_close(subject.run(plain), subject.run(), rtol=1e-12, atol=1e-12)


def test_houlsby_has_the_tanh_form_of_gelu():
    """0.5 z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))), value by value."""
    method = sm.parse("Houlsby").terms[0]
    z = torch.linspace(-4, 4, 33, dtype=torch.float64)
    wanted = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in z.tolist()]
    p = {"D": torch.ones(1, 1), "d": torch.zeros(1), "U": torch.ones(1, 1), "u": torch.zeros(1)}
    found = method.after({k: v.double() for k, v in p.items()}, z[:, None], z[:, None], None) - z[:, None]
    torch.testing.assert_close(found[:, 0], torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found[:, 0], torch.nn.functional.gelu(z), atol=1e-5)


def test_the_parallel_form_is_not_the_sequential_one():
    outputs = []
    for form in ("sequential", "parallel"):
        subject = case(f"Adapter(width=3, form={form!r})", "bert")
        subject.attach(perturb=0.3)
        outputs.append(subject.run())
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize(
    ("site", "sublayers"), [("attention", 1), ("feed_forward", 1), (("attention", "feed_forward"), 2)]
)
def test_counts_are_the_closed_form(site, sublayers):
    """L * (2 d b + b + d) for each kind of sublayer; 113,040 for MiniLM's six layers at b = 24."""
    with torch.device("meta"):
        config = T.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        model = T.BertForSequenceClassification(config)
    plan = sm.plan(model, sm.Adapter(site, width=24))
    assert plan.trained == 113_040 * sublayers


BASE = {"vocab_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES = {**BASE, "hidden_size": 16, "intermediate_size": 24, "num_experts_per_tok": 2, "eos_token_id": 3}
EXPERTS = {
    "mixtral": lambda: T.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": lambda: T.Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, moe_intermediate_size=8),
    "gpt_oss": lambda: T.GptOssConfig(**SIZES, head_dim=8, num_local_experts=4),  # its experts give a tuple
}


@pytest.mark.parametrize("form", ["sequential", "parallel"])
@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixture_of_experts_is_one_sublayer(name, form):
    model = T.AutoModelForCausalLM.from_config(EXPERTS[name]()).eval()
    shake(model.parameters(), 0.1)
    assert [s.kind for s in find_sublayers(model)] == ["attention", "feed_forward"] * 2
    plain = copy.deepcopy(model)
    with h.untouched(model):
        sm.attach(model, f"Adapter('feed_forward', width=3, form={form!r}, activation='tanh')")
        values = trained_parameters(model)
        shake(values.values(), 0.3)
        found, delta = h.logits(model), sm.detach(model)

    def add(module, args, output):
        f, x = output[0] if isinstance(output, tuple) else output, args[0]
        p = {s: delta.tensors[f"model.layers.{module.layer}.mlp.edits.0.{s}"] for s in ("D", "d", "U", "u")}
        y = f + torch.tanh((x if form == "parallel" else f) @ p["D"].T + p["d"]) @ p["U"].T + p["u"]
        return (y, *output[1:]) if isinstance(output, tuple) else y

    for layer, block in enumerate(plain.model.layers):
        block.mlp.layer = layer
        block.mlp.register_forward_hook(add)
    torch.testing.assert_close(found, h.logits(plain), rtol=1e-4, atol=1e-5)


def test_nothing_is_left_behind():
    model = h.bert()
    with h.untouched(model):
        sm.attach(model, "Adapter(width=3, form='parallel') + IA3()")
        assert sum(isinstance(m, Tap) for m in model.modules()) == 4
        h.logits(model)
        sm.detach(model)
    assert not [m for m in model.modules() if isinstance(m, Tap)]


def test_a_prefix_of_the_model_needs_no_gradient():
    model = h.bert()
    assert sm.plan(model, sm.Adapter(layers="top:1")).lowest == "bert.encoder.layer.1"


def test_merging_is_refused_with_the_reason():
    model = h.bert()
    sm.attach(model, "LN() + Adapter(width=3)")
    with pytest.raises(AttachError, match="keep the delta attached: Adapter.*bottleneck with a nonlinearity"):
        sm.merge(model)


def test_a_method_that_edits_a_sublayers_input_is_refused():
    class Early(sm.Adapter, abstract=True):
        def before(self, p, x, site):
            return x

    with pytest.raises(AttachError, match="edits the input of the attention at"):
        sm.attach(h.bert(), Early())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"site": "atention"}, "site='atention' is not one of .*did you mean"),
        ({"form": "serial"}, "form='serial' is not one of sequential, parallel"),
        ({"activation": "swish"}, "activation='swish'"),
        ({"width": 0}, "width=0 must be a whole number of at least 1"),
        ({"scale": 0}, "scale=0 must be a number above 0"),
        ({"layers": "upper"}, "layers='upper' cannot be read"),
    ],
)
def test_wrong_fields_are_one_line(fields, message):
    with pytest.raises(RecipeError, match=message):
        sm.Adapter(**fields)


def test_a_model_without_the_sublayer_is_refused():
    with pytest.raises(PlanError, match="site names 'cross_attention', which is not found .* it has attention, feed_f"):
        sm.plan(h.bert(), sm.Adapter(site="cross_attention"))


def test_taps_are_clear_after_a_pass():
    model = sm.attach(h.bert(), "Adapter(form='parallel')")
    shake(p for n, p in model.named_parameters() if "edits" in n)
    model(**h.ids()).logits.sum().backward()
    assert not any(state().taps.values())
    copy.deepcopy(model)
