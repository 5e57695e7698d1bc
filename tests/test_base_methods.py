"""Methods that start from the base's own weight or read it: DoRA, PiSSA, and SSF beside them."""

import copy

import pytest
import torch
import transformers as T
from torch.nn import functional as F

import smidgen as sm
from smidgen.common.errors import AttachError, PlanError, RecipeError, SmidgenError
from smidgen.delta.delta import Delta
from smidgen.methods.low_rank.dora import DoRA
from smidgen.methods.low_rank.pissa import PiSSA
from smidgen.planning.entry import START
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.recipe.recipe import as_recipe
from smidgen.testing.suite import CHECKS, case, run_check, shake, tiny
from tests import helpers as h

SUMS = (
    "LoRA(rank=2, target='linear') + DoRA(rank=2, target='linear') + IA3()",
    "PiSSA(rank=2, target='linear', iterations=4) + SSF(norms=False, shift=False)",
    "DoRA(rank=2, target=('query', 'attention_out'), scaling='rslora', lr_ratio=16)",
    "PiSSA(rank=3) + DoRA(rank=2) | Select('random', keep=0.5)",
)
QUICK = [c for c in CHECKS if c not in ("docstring_is_true", "compiled_sees_attach_and_detach")]


@pytest.mark.parametrize("recipe", SUMS)
@pytest.mark.parametrize("model", ["bert", "gpt2"])
@pytest.mark.parametrize("check", QUICK)
def test_conformance_of_sums(check, model, recipe):
    run_check(check, recipe, model)


def row_norms(weight):
    return torch.stack([row.square().sum().sqrt() for row in weight])


def test_dora_is_the_formula_row_by_row():
    subject = case("DoRA(rank=2, alpha=3, target='query')")
    base = copy.deepcopy(subject.model)
    subject.attach(perturb=0.3)
    values = trained_parameters(subject.model)
    for i, layer in enumerate(base.bert.encoder.layer):
        path = f"bert.encoder.layer.{i}.attention.self.query.edits.0"
        A, B, m = (values[f"{path}.{s}"].detach() for s in "ABm")
        weight = layer.attention.self.query.weight
        v = weight + 1.5 * B @ A
        weight.data = torch.stack([m[j] * v[j] / v[j].norm() for j in range(len(v))])
    with torch.no_grad():
        for name in ("classifier.weight", "classifier.bias"):
            base.get_parameter(name).copy_(values[name])
    torch.testing.assert_close(subject.run(base), subject.run(), rtol=1e-10, atol=1e-10)


def test_dora_merges_to_rows_of_length_m():
    model = h.bert()
    sm.attach(model, "DoRA(rank=2, target='value')")
    shake(trained_parameters(model).values())
    values, merged = trained_parameters(model), sm.merge(model)
    for i, layer in enumerate(merged.bert.encoder.layer):
        m = values[f"bert.encoder.layer.{i}.attention.self.value.edits.0.m"]
        torch.testing.assert_close(row_norms(layer.attention.self.value.weight), m.abs())


def test_doras_norm_is_a_constant_to_the_gradient():
    """As in section 4.3: the gradient of B is that of m / |V| * (V x) with |V| held."""
    x, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    A, B = torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    m, site = torch.randn(3, dtype=torch.float64), None
    p = {"A": A, "B": B, "m": m}
    DoRA(rank=2, alpha=2).after_with(p, x, x @ weight.T, {"weight": weight}, site).sum().backward()
    held = row_norms(weight + B.detach() @ A)
    expected = torch.autograd.grad((m / held * (x @ (weight + B @ A).T)).sum(), B)[0]
    torch.testing.assert_close(B.grad, expected)
    free = torch.autograd.grad((m / row_norms(weight + B @ A) * (x @ (weight + B @ A).T)).sum(), B)[0]
    assert not torch.allclose(free, expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_dora_agrees_with_peft():
    peft = pytest.importorskip("peft")
    model = h.causal()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], use_dora=True)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    shake([p for n, p in theirs.named_parameters() if "lora_" in n])
    sm.attach(model, "DoRA(rank=2, alpha=4, target=('q_proj', 'down_proj'))")
    found = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, value in trained_parameters(model).items():
            path, _, symbol = name.partition(".edits.0.")
            theirs_is = {"A": "lora_A.default", "B": "lora_B.default", "m": "lora_magnitude_vector.default"}[symbol]
            value.copy_(found[f"base_model.model.{path}.{theirs_is}.weight"])
    torch.testing.assert_close(h.logits(model), h.logits(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_pissa_agrees_with_peft():
    """Which takes the start out of the base: what both do with the same A and B."""
    peft = pytest.importorskip("peft")
    model = h.causal()
    options = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=4, **options)).eval()
    sm.attach(model, "PiSSA(rank=2, alpha=4, target=('q_proj', 'down_proj'))")
    shake([p for n, p in theirs.named_parameters() if "lora_" in n])
    found = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, value in trained_parameters(model).items():
            path, _, symbol = name.partition(".edits.0.")
            value.copy_(found[f"base_model.model.{path}.lora_{symbol}.default.weight"])
    torch.testing.assert_close(h.logits(model), h.logits(theirs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("recipe", ["DoRA(rank=2)", "PiSSA(rank=2)", "SSF()", "Adapter(width=3, form='parallel')"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_compiled_graph(kind, recipe):
    model = h.causal(kind)
    sm.attach(model, recipe)
    shake(trained_parameters(model).values())
    model.requires_grad_(False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(h.logits(compiled), h.logits(model), rtol=1e-4, atol=1e-5)


def test_pissa_takes_the_principal_part():
    model = h.bert()
    weight = model.bert.encoder.layer[0].attention.self.query.weight.detach().clone()
    sm.attach(model, "PiSSA(rank=3, alpha=6, target='query')")
    values = trained_parameters(model)
    path = "bert.encoder.layer.0.attention.self.query"
    part = 2 * values[f"{path}.edits.0.B"] @ values[f"{path}.edits.0.A"]
    S = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(weight - part)[:3], S[3:6], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.get_parameter(f"{path}.weight"), weight)


def test_pissa_is_residual_plus_factors():
    """What the authors compute, with B0 A0 taken out of the weight."""
    x, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    method = PiSSA(rank=2, alpha=3)
    p = method.from_base({}, {"weight": weight}, None)
    A, B = p["A"] + 0.1, p["B"] - 0.2
    found = method.after({"A": A, "B": B, "A0": p["A"], "B0": p["B"]}, x, F.linear(x, weight), None)
    residual = weight - 1.5 * p["B"] @ p["A"]
    torch.testing.assert_close(found, F.linear(x, residual + 1.5 * B @ A))


def test_pissas_file_holds_its_start(tmp_path):
    model = h.bert()
    sm.attach(model, "PiSSA(rank=2)")
    shake(p for n, p in trained_parameters(model).items() if "edits" in n)
    before, delta = h.logits(model), sm.detach(model)
    assert sum(name.endswith(START) for name in delta.tensors) == 2 * 4
    assert delta.trained == 4 * 2 * (16 + 16)
    loaded = Delta.load(delta.save(tmp_path))
    sm.attach(model, loaded)
    assert torch.equal(h.logits(model), before)


def test_a_loaded_delta_computes_no_decomposition(monkeypatch):
    model = h.bert()
    sm.attach(model, "PiSSA(rank=2)")
    delta = sm.detach(model)
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **options: pytest.fail("decomposed"))
    sm.attach(model, delta)
    sm.detach(model)
    with pytest.raises(pytest.fail.Exception, match="decomposed"):
        sm.attach(model, "PiSSA(rank=2)")


def test_starts_do_not_depend_on_what_else_is_attached():
    alone, among = h.bert(), h.bert()
    sm.attach(alone, "DoRA(layers=0)")
    sm.attach(among, "DoRA()")
    h.same(
        {n: p for n, p in trained_parameters(alone).items() if "layer.0" in n},
        {n: p for n, p in trained_parameters(among).items() if "layer.0" in n},
    )


def test_starts_leave_torchs_generator_alone():
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    sm.attach(h.bert(), "PiSSA(rank=2, iterations=2) + DoRA(rank=2)")
    assert torch.equal(torch.rand(1), wanted)


def test_reading_a_weight_that_cannot_be_folded_is_refused():
    with pytest.raises(PlanError, match=r"DoRA.* reads the weight at .*dense, where Adapter.* write DoRA"):
        sm.plan(h.bert(), "Adapter() + DoRA(target='ff_out')")
    sm.attach(h.bert(), "DoRA(target='ff_out') + Adapter()")


def test_ssf_merges_with_and_without_a_bias():
    llama = h.causal()
    sm.attach(llama, "SSF()")
    with pytest.raises(AttachError, match="q_proj has no bias to take the shift; shift=False merges"):
        sm.merge(llama)
    sm.detach(llama)
    sm.attach(llama, "SSF(shift=False)")
    shake(trained_parameters(llama).values())
    torch.testing.assert_close(h.logits(sm.merge(llama)), h.logits(llama), rtol=1e-3, atol=1e-4)


def counted(recipe):
    """On BERT-base."""
    with torch.device("meta"):
        return sm.plan(T.BertForSequenceClassification(T.BertConfig()), recipe).trained


def test_counts_are_the_closed_forms():
    d, L = 768, 12
    assert counted("DoRA(rank=4)") == L * 2 * (4 * 2 * d + d)
    assert counted("PiSSA(rank=4)") == L * 2 * 4 * 2 * d
    # query, key, value, attention output, two norms: d each; feed-forward 4 d and d
    assert counted("SSF()") == L * 2 * (4 * d + 2 * d + 5 * d)
    assert counted("SSF(norms=False, shift=False)") == L * 9 * d


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PiSSA(iterations=0), "iterations=0 must be None or a whole number of at least 1"),
        (lambda: DoRA(rank=0), "rank=0"),
        (lambda: sm.SSF(layers="all"), "layers='all' cannot be read"),
    ],
)
def test_wrong_fields_are_one_line(build, message):
    with pytest.raises(RecipeError, match=message):
        build()


# IA3 with other targets


@pytest.mark.parametrize(
    ("recipe", "model"),
    [
        ("IA3(target=('query', 'attention_out', 'ff_in'), inputs=('attention_out', 'ff_in'))", "bert"),
        ("IA3(target='linear', inputs=())", "llama"),
        ("IA3(target=('c_attn', 'ff_out'), inputs='c_attn')", "gpt2"),
    ],
)
def test_ia3_at_other_maps_is_the_formula(recipe, model):
    """y_j = l_j (sum_k W_jk x_k + b_j), or sum_k W_jk l_k x_k + b_j, from plain loops over the modules' own weights."""
    subject = case(recipe, model)
    plain = copy.deepcopy(subject.model)
    subject.attach(perturb=0.3)
    method, count = as_recipe(recipe).terms[0], 0
    for row in attachment(subject.model).plan.entries:
        l = trained_parameters(subject.model)[row.name("l")].detach()  # noqa: E741 (the paper's symbol)
        module, inner = plain.get_submodule(row.site.path), row.site.path.endswith(INNER[recipe])
        weight = module.weight.data.T if row.site.transposed else module.weight.data
        assert method.enters(row.site) == inner
        assert l.shape == (weight.shape[1 if inner else 0],)
        for j in range(len(weight)):
            if inner:
                weight[j] *= l
            else:
                weight[j] *= l[j]
                if module.bias is not None:
                    module.bias.data[j] *= l[j]
        count += 1
    assert count >= 4
    for name in Delta.of(subject.model).head:
        plain.get_parameter(name).data.copy_(trained_parameters(subject.model)[name].detach())
    torch.testing.assert_close(subject.run(plain), subject.run(), rtol=1e-10, atol=1e-10)


INNER = {
    "IA3(target=('query', 'attention_out', 'ff_in'), inputs=('attention_out', 'ff_in'))": (
        "attention.output.dense",
        "intermediate.dense",
    ),
    "IA3(target='linear', inputs=())": (),
    "IA3(target=('c_attn', 'ff_out'), inputs='c_attn')": ("attn.c_attn",),
}


@pytest.mark.parametrize("recipe", INNER)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("check", ["starts_as_identity", "acts", "merges", "gradients_are_those_of_the_merged_weight"])
def test_ia3_at_other_maps_conforms(check, model, recipe):
    if ("c_attn" in recipe and model != "gpt2") or ("query" in recipe and model == "gpt2"):
        pytest.skip("other names")
    run_check(check, recipe, model)


@pytest.mark.parametrize(
    ("model", "recipe", "said"),
    [
        ("gpt2", "IA3(target='query', inputs='query')", "whose slices share one input; scale its output, or name the"),
        (
            "bert",
            "IA3(target='qeury')",
            "IA3: target names 'qeury', which this model does not have; did you mean 'query'",
        ),
        ("bert", "IA3(inputs=('ff_out', 'nowhere'))", "IA3: inputs names 'nowhere'"),
        ("bert", "IA3(target=())", "target=() must be a name"),
        ("bert", "IA3(inputs=3)", "inputs=3 must be a name"),
    ],
)
def test_ia3_refuses_what_is_not_there(model, recipe, said):
    with pytest.raises(SmidgenError) as error:
        sm.attach(tiny(model), recipe)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_heads_of_an_ia3_that_scales_outputs():
    """A vector on the output map's outputs belongs to no head; on its inputs it does, on the queries' outputs too."""
    for inputs, heads in (((), False), ("attention_out", True)):
        model, recipe = h.bert(), sm.IA3(target="attention_out", inputs=inputs) | sm.Select("random", 1, "head")
        if heads:
            kept = sm.select(model, recipe).indices
            assert sum(map(len, kept.values())) == 8
        else:
            with pytest.raises(SmidgenError, match="granularity='head' needs"):
                sm.select(model, recipe)
