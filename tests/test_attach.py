"""Attach and detach: what comes back, what is refused, and what an attached model still can do."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import pytest
import torch
import transformers as T
from torch import nn

import smidgen as sm
from smidgen.common.errors import AttachError, PlanError
from smidgen.methods.base import Method
from smidgen.ports.attachment_record import attachment, is_attached, trained_parameters
from smidgen.recipe.recipe import Term
from smidgen.sites.site import OwnerSite
from smidgen.sites.task_head import own_pooling
from smidgen.testing.cases import inputs_for, shake, tiny
from tests import helpers as h

FEW = {"MoS": {"rank": 3}}  # the default needs three layers, the tiny models have two
METHODS = [cls(**FEW.get(name, {})) for name, cls in sorted(Term.registry.items()) if issubclass(cls, Method)]
LOW = [torch.bfloat16, torch.float16]


# What comes back


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_twenty_rounds_leave_the_base_bit_for_bit(method):
    model = h.bert()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    before = h.logits(model)
    with h.untouched(model):
        for round in range(20):
            sm.attach(model, method, seed=round)
            shake(trained_parameters(model).values(), 0.5)
            if round % 5 == 0:
                assert not torch.equal(h.logits(model), before)
            sm.detach(model)
    assert torch.equal(h.logits(model), before)


def test_a_delta_attached_twenty_times_does_the_same():
    model = h.bert()
    sm.attach(model, "LN() + LoRA(rank=2) + IA3()")
    shake(trained_parameters(model).values(), 0.3)
    trained, delta = h.logits(model), sm.detach(model)
    with h.untouched(model):
        for _ in range(20):
            sm.attach(model, delta)
            assert torch.equal(h.logits(model), trained)
            h.same(sm.detach(model), delta)


def test_attached_restores_modes_and_detaches_after_an_error():
    model = h.bert().train()
    model.bert.encoder.layer[0].eval()
    delta = sm.detach(sm.attach(model, "LN()"))
    with h.untouched(model):
        with pytest.raises(ZeroDivisionError), sm.attached(model, delta):
            assert not any(module.training for module in model.modules())
            raise ZeroDivisionError
        assert not is_attached(model)
        with sm.attached(model, "LoRA(rank=2)") as inside:
            assert inside is model
            assert model.training
            assert not model.bert.encoder.layer[0].training
            model.eval()
    with h.untouched(model), pytest.raises(PlanError), sm.attached(model, "LN(which='qk')"):
        pass


def test_flags_come_back_and_only_the_trained_is_free():
    model = h.bert()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    with h.untouched(model):
        sm.attach(model, "LN(which='output')")
        free = {n for n, p in model.named_parameters() if p.requires_grad}
        assert free == {
            *(f"bert.encoder.layer.{i}.output.LayerNorm.{t}" for i in (0, 1) for t in ("weight", "bias")),
            "classifier.weight",
            "classifier.bias",
        }
        sm.detach(model)


def test_disabled_gives_the_base_and_keeps_the_trained():
    model = h.causal()
    before = h.logits(model)
    sm.attach(model, "LN() + LoRA(rank=2)")
    shake(trained_parameters(model).values(), 0.3)
    trained = h.logits(model)
    with pytest.raises(ZeroDivisionError), sm.disabled(model):
        assert torch.equal(h.logits(model), before)
        raise ZeroDivisionError
    assert torch.equal(h.logits(model), trained)
    assert not torch.equal(trained, before)
    with pytest.raises(AttachError, match="nothing is attached"), sm.disabled(h.causal()):
        pass


@pytest.mark.parametrize("what", ["edits", "out_proj"])
def test_a_refused_attach_leaves_the_model_as_it_was(what):
    model, recipe = (encoder(), Everywhere()) if what == "out_proj" else (with_edits(), "LoRA(rank=2, target='linear')")
    with h.untouched(model), pytest.raises(AttachError):
        sm.attach(model, recipe)
    assert not is_attached(model)


# What is refused


def test_attached_twice():
    model = sm.attach(h.bert(), "LN()")
    with pytest.raises(AttachError, match=r"LN\(\) is attached already; detach it first"):
        sm.attach(model, "IA3()")
    assert str(attachment(model).plan.recipe) == "LN()"


def test_nothing_attached():
    model = h.bert()
    for call in (sm.detach, sm.Delta.of, sm.merge, sm.print_trainable_parameters, sm.optimizer):
        with pytest.raises(
            AttachError, match=r"nothing is attached to this BertForSequenceClassification.*sm\w*\.attach"
        ):
            call(model)


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ("LN() + BitFit()", r"embeddings\.LayerNorm\.bias would be trained twice: by LN\(\) and by BitFit\(\)"),
        ("Full(layers='top:1') + LN()", r"layer\.1\.\S+ would be trained twice: by Full\(layers='top:1'\) and by LN"),
        ("LN() + LN(which='output')", r"trained twice: by LN\(\) and by LN\(which='output'\)"),
    ],
)
def test_a_tensor_trained_twice(recipe, named):
    model = h.bert()
    with h.untouched(model), pytest.raises(PlanError, match=named):
        sm.attach(model, recipe)
    sm.attach(model, "LN() + BitFit(norms=False)")


def test_a_recipe_that_matches_nothing():
    with pytest.raises(PlanError, match=r"LN\(which='qk'\) matches no site of Bert\w+; roles found: .*norm") as error:
        sm.attach(h.bert(), "LN(which='qk')")
    for role in ("embedding", "query", "attention_out", "ff_in", "ff_out"):
        assert role in str(error.value)
    with pytest.raises(PlanError, match=r"BitFit\(\) matches no site of LlamaForCausalLM"):
        sm.attach(h.causal(), "BitFit()")


def test_a_quantised_base():
    model = h.bert()
    model.is_quantized = True
    with pytest.raises(PlanError, match="is quantised; load it in float32"):
        sm.attach(model, "LN()")
    model = h.bert()
    weight = torch.zeros(16, 16, dtype=torch.int8)
    model.bert.encoder.layer[0].output.dense.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(PlanError, match="is quantised"):
        sm.attach(model, "LN()")
    model.bert.encoder.layer[0].output.dense.weight = nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(PlanError, match="is quantised"):
        sm.attach(model, "LN()")


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def with_edits():
    class Busy(nn.Linear):
        edits = None

    model = h.bert()
    last = model.bert.encoder.layer[1].output
    busy = Busy(24, 16)
    busy.load_state_dict(last.dense.state_dict())
    last.dense = busy.eval()
    return model


@dataclass(frozen=True)
class Everywhere(Method, abstract=True):
    """Scale what some modules of width 16 give."""

    def acts(self, site):
        return isinstance(site, OwnerSite) and site.path.endswith(("linear2", "out_proj"))

    def init(self, site):
        return {"l": torch.ones(16)}

    def after(self, p, x, y, site):
        return p["l"] * y


def test_out_proj_of_multihead_attention():
    with pytest.raises(PlanError, match="target names 'out_proj', which is no linear map"):
        sm.attach(encoder(), "LoRA(rank=2, target='out_proj')")
    with pytest.raises(
        AttachError, match=r"self_attn\.out_proj belongs to nn\.MultiheadAttention, which never calls it"
    ):
        sm.attach(encoder(), Everywhere())


def test_a_module_that_has_edits_of_its_own():
    with pytest.raises(AttachError, match=r"Busy at bert\.encoder\.layer\.1\.output\.dense already has .* 'edits'"):
        sm.attach(with_edits(), "LoRA(rank=2, target='ff_out')")
    sm.attach(with_edits(), "LN()")


def test_layers_of_a_model_that_shares_them():
    model = h.build("albert")
    with pytest.raises(PlanError, match=r"LN\(layers='top:1'\): Albert\w+ uses the same layers at every depth"):
        sm.attach(model, "LN(layers='top:1')")
    before = h.logits(model)
    sm.attach(model, "LN() + LoRA(rank=2)")
    assert torch.equal(h.logits(model), before)
    shake(trained_parameters(model).values(), 0.3)
    assert not torch.equal(h.logits(model), before)


def test_a_rank_above_the_width():
    with pytest.raises(sm.SmidgenError, match="rank=17 is above the smaller side of .* at most 16 works"):
        sm.attach(h.bert(), "LoRA(rank=17)")


def test_saving_an_attached_model(tmp_path):
    model = sm.attach(h.bert(), "LN()")
    with pytest.raises(
        AttachError, match=r"smidgen\.Delta\.of\(model\)\.save.*smidgen\.merge\(model\)\.save_pretrained"
    ):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    twin = copy.deepcopy(model)
    with pytest.raises(AttachError, match="merge"):
        twin.save_pretrained(tmp_path / "model")
    sm.detach(model)
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()


# Tied weights


def test_tied_weights_are_swapped_at_both_owners_and_counted_once():
    model = h.causal("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    original, values = model.lm_head.weight, sum(p.numel() for p in model.parameters())
    with h.untouched(model):
        sm.attach(model, "Full()")
        assert model.lm_head.weight is model.transformer.wte.weight
        assert model.lm_head.weight is not original
        assert attachment(model).plan.trained == attachment(model).plan.pretrained == values
        assert sum(group["params"].__len__() for group in sm.optimizer(model).param_groups) == len(
            list(model.parameters())
        )
        before = h.logits(model)
        with torch.no_grad():
            model.lm_head.weight += 0.5
        assert not torch.equal(h.logits(model), before)
        with sm.disabled(model):
            assert model.lm_head.weight is model.transformer.wte.weight is original
        trained = h.logits(model)
        merged = sm.merge(model)
        assert merged.lm_head.weight is merged.transformer.wte.weight
        assert torch.equal(h.logits(merged), trained)
        delta = sm.detach(model)
    assert model.lm_head.weight is model.transformer.wte.weight is original
    names = [name for name in delta.tensors if "wte" in name or "lm_head" in name]
    assert names == ["transformer.wte.weight"]
    assert delta.trained == values


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_edit_on_a_tied_weight_is_merged_untied(kind, tmp_path):
    model = h.causal(kind, tie_word_embeddings=True)
    table = model.get_input_embeddings().weight
    assert model.lm_head.weight is table
    sm.attach(model, "LoRA(rank=2, target='lm_head')")
    shake(trained_parameters(model).values(), 0.3)
    wanted = h.logits(model)
    size = f"{table.numel():,}"
    with pytest.warns(sm.UntiedWarning, match=rf"unties lm_head\.weight from .*{size} values more; its config.*False"):
        merged = sm.merge(model)
    torch.testing.assert_close(h.logits(merged), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.get_input_embeddings().weight, table), "what the weight was tied to stands"
    assert model.lm_head.weight is table
    assert model.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(h.logits(again), h.logits(merged))


def test_where_other_weights_stay_tied_the_configuration_does_too(tmp_path):
    model = h.build("bert", "AutoModelForMaskedLM")
    sm.attach(model, "LoRA(rank=2, target='decoder')")
    shake(trained_parameters(model).values(), 0.3)
    wanted = h.logits(model)
    with pytest.warns(sm.UntiedWarning, match=r"unties cls\.predictions\.decoder\.weight .*stays, for other weights"):
        merged = sm.merge(model)
    torch.testing.assert_close(h.logits(merged), wanted, rtol=1e-4, atol=1e-5)
    assert merged.cls.predictions.decoder.bias is merged.cls.predictions.bias
    merged.save_pretrained(tmp_path)
    again = T.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(h.logits(again), h.logits(merged))


def test_one_module_under_two_names_is_not_tied():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.norm, self.second = nn.LayerNorm(4), self.first

        def forward(self, x):
            return self.second(self.norm(self.first(x)))

    model, x = Twice(), torch.randn(2, 4)
    sm.attach(model, "LoRA(rank=2, target='first')")
    shake(trained_parameters(model).values(), 0.3)
    merged = sm.merge(model)
    assert merged.first is merged.second
    torch.testing.assert_close(merged(x), model(x))


# dtypes and devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("recipe", ["LN()", "LoRA(rank=2)"])
def test_a_cast_of_an_attached_model_is_noticed(recipe, dtype):
    model = sm.attach(h.bert(), recipe).to(dtype)
    with pytest.raises(AttachError, match=rf"was cast to {str(dtype)[6:]}.*detach, cast the base, attach again"):
        model(**h.ids())


def test_a_delta_of_a_cast_model_is_refused():
    model = sm.attach(h.bert(), "LN()").half()
    with pytest.raises(AttachError, match="was cast"):
        sm.Delta.of(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no second device")
def test_moved_to_a_device_and_detached():
    model = sm.attach(h.bert(), "LN() + LoRA(rank=2)").to("cuda")
    model(**{k: v.to("cuda") for k, v in h.ids().items()})
    sm.detach(model)
    assert {p.device.type for p in model.parameters()} == {"cuda"}


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("recipe", ["LN()", "LN(terms='gain')", "BitFit()", "Full()", "LoRA(rank=2)", "IA3()"])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_masters_are_float32_in_a_low_precision_base(kind, recipe, dtype):
    model = tiny(kind).to(dtype).eval()
    if kind == "llama" and recipe in ("BitFit()",):
        pytest.skip("no biases")
    if kind == "llama" and recipe == "LN(terms='gain')":
        pytest.skip("the same as LN()")
    inputs = inputs_for(kind)
    with h.untouched(model):
        before = h.logits(model, **inputs)
        sm.attach(model, recipe)
        assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
        out = h.logits(model, **inputs)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), before.float(), rtol=0.03, atol=0.03 * before.abs().max().item())
        model(**inputs).logits.float().square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in trained_parameters(model).values())
        model.eval()
        delta = sm.detach(model)
        assert {t.dtype for t in delta.tensors.values()} == {torch.float32}
        assert torch.equal(h.logits(model, **inputs), before)
        assert delta.base.dtype == str(dtype)[6:]


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_every_gain_moves_in_a_bfloat16_base(kind):
    """Near 1.0 neighbouring bfloat16 numbers are 0.008 apart: steps of 1e-4 on them would be lost."""
    model = tiny(kind).to(torch.bfloat16)
    sites = {site.path: site for site in sm.find_sites(model) if site.kind == "norm"}
    with torch.no_grad():
        for path, site in sites.items():
            model.get_parameter(f"{path}.{site.gain}").uniform_(0.95, 1.05)
    sm.attach(model.train(), "LN()")
    start = {n: p.detach().clone() for n, p in trained_parameters(model).items()}
    head = {name for name, _ in attachment(model).plan.head}
    adam = sm.optimizer(model, lr=1e-4)
    inputs = {**inputs_for(kind), "labels": torch.tensor([0, 1, 2])}
    if kind != "bert":
        inputs["labels"] = inputs["input_ids"]
    for _ in range(20):
        model(**inputs).loss.backward()
        adam.step()
        adam.zero_grad()
    for name, parameter in trained_parameters(model).items():
        if name not in head:
            moved = (parameter.detach() - start[name]).abs()
            assert moved.min() > 0, f"{int((moved == 0).sum())} values of {name} did not move"
            assert moved.max() < 0.004, "the steps are below half the distance of two bfloat16 numbers"
    delta = sm.detach(model)
    assert all((delta.tensors[n] != start[n]).all() for n in start if n not in head)


def test_bare_bfloat16_gains_would_not_move():
    """What the test above guards against does happen without masters."""
    gain = nn.Parameter(torch.full((8,), 1.0, dtype=torch.bfloat16))
    adam = torch.optim.AdamW([gain], lr=1e-4, weight_decay=0)
    for _ in range(20):
        gain.grad = torch.ones_like(gain)
        adam.step()
    assert torch.equal(gain.detach(), torch.ones_like(gain))


# Seeds, copies, printing


def test_the_seed_decides_and_the_global_generators_are_left_alone():
    torch.manual_seed(5)
    random.seed(5)
    before, python = torch.get_rng_state(), random.getstate()
    starts = [sm.detach(sm.attach(h.bert(), "LoRA(rank=2)", seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python
    h.same(starts[0], starts[1])
    name = next(name for name in starts[0].tensors if name.endswith(".A"))
    assert not torch.equal(starts[0].tensors[name], starts[2].tensors[name])
    torch.rand(7)
    h.same(sm.detach(sm.attach(h.bert(), "LoRA(rank=2)", seed=1)), starts[0])


def test_load_leaves_the_global_generator_alone(tmp_path):
    h.build("bert", "AutoModel").save_pretrained(tmp_path / "base")
    h.tokenizer().save_pretrained(tmp_path / "base")
    task = h.task(tmp_path / "task", 8, 4)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    models = [sm.load(tmp_path / "base", task=task, seed=seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    heads = [model.classifier.weight for model in models]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    torch.rand(7)
    assert torch.equal(sm.load(tmp_path / "base", task=task)[0].classifier.weight, heads[0])


def test_a_deep_copy_stands_alone():
    model = sm.attach(h.bert(), "LN() + LoRA(rank=2)")
    shake(trained_parameters(model).values(), 0.3)
    before, twin = h.logits(model), copy.deepcopy(model)
    assert torch.equal(h.logits(twin), before)
    sm.detach(model)
    assert torch.equal(h.logits(twin), before)
    assert not is_attached(model)
    assert is_attached(twin)
    sm.detach(twin)
    assert torch.equal(h.logits(twin), h.logits(model))


def test_print_trainable_parameters(capsys):
    sm.print_trainable_parameters(sm.attach(h.bert(), "LN()"))
    model = h.bert()
    every, head = sum(p.numel() for p in model.parameters()), 2 * 16 + 2
    share = 100 * 160 / (every - head)
    assert capsys.readouterr().out == (
        f"trainable params: 160 || head params: 34 || all params: {every:,} || trainable%: {share:.4f}\n"
    )


def test_an_attached_model_keeps_its_class_and_signature():
    import inspect

    model = h.bert()
    before = inspect.signature(model.forward)
    sm.attach(model, "LN() + LoRA(rank=2)")
    assert type(model) is T.BertForSequenceClassification
    assert inspect.signature(model.forward) == before
    assert "LoRA(rank=2) at bert.encoder.layer.0.attention.self.query" in str(model)


def test_a_keyword_call_of_an_edited_module_is_an_error_where_the_input_is_edited():
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            return x + self.down(input=self.up(self.norm(x)))

    @dataclass(frozen=True)
    class Doubled(Method, abstract=True):
        def acts(self, site):
            return site.path.endswith("down")

        def init(self, site):
            return {"l": torch.ones(site.width_in)}

        def before(self, p, x, site):
            return p["l"] * x

    model = sm.attach(Called(), Doubled())
    with pytest.raises(AttachError, match="Linear was called without a positional input"):
        model(torch.zeros(1, 8))


def test_own_pooling_is_told():
    assert own_pooling(h.bert()) == "first"
    assert own_pooling(h.build("llama")) == "last"
    assert own_pooling(nn.Linear(2, 2)) is None
