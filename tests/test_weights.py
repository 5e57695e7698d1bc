"""LoRA at weights that no called map owns: of experts, of nn.MultiheadAttention, of maps that are only read."""

import copy

import pytest
import torch
import transformers as T
from torch import nn

import smidgen as sm
from smidgen.common.errors import DeltaError, PlanError
from smidgen.delta.delta import Delta
from smidgen.delta.hf_peft.conversion import to_peft
from smidgen.delta.merging import folded
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.sites.site import WeightSite
from smidgen.testing.cases import shake
from tests import helpers as h

MOE = {"num_experts_per_tok": 2, "num_key_value_heads": 2}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}


HEADLESS = {name: value for name, value in SMALL.items() if name != "head_dim"}


class Attending(nn.Module):
    """nn.MultiheadAttention between two maps; keys and values of another width have weights of their own."""

    def __init__(self, width=None):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=width, vdim=width)
        self.width = width

    def forward(self, x):
        q = self.first(x)
        kv = q if self.width is None else q[..., : self.width]
        return self.last(self.attention(q, kv, kv, need_weights=False)[0])


def text(config):
    return lambda: T.AutoModelForCausalLM.from_config(config())


CASES = {
    "mixtral": (
        text(lambda: T.MixtralConfig(**SMALL, **MOE, vocab_size=30, num_local_experts=4)),
        ("experts.gate_up_proj", "experts.down_proj"),
    ),
    "gpt_oss": (
        text(lambda: T.GptOssConfig(**SMALL, **MOE, vocab_size=30, num_local_experts=4, pad_token_id=0)),
        ("experts.gate_up_proj", "experts.down_proj"),
    ),
    "granitemoe": (
        text(lambda: T.GraniteMoeConfig(**HEADLESS, **MOE, vocab_size=30, num_local_experts=4)),
        "experts.down_proj",
    ),
    "mamba": (
        text(lambda: T.MambaConfig(hidden_size=16, time_step_rank=3, num_hidden_layers=2, vocab_size=30, state_size=4)),
        "dt_proj.weight",
    ),
    "attention": (Attending, ("attention.in_proj_weight", "out_proj.weight")),
    "attention, own maps": (lambda: Attending(5), ("q_proj_weight", "attention.k_proj_weight")[1:]),
}  # fmt: skip


def built(name, dtype=torch.float64):
    make, target = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().to(dtype).eval()
    if "experts" in str(target):
        model.set_experts_implementation("eager")  # the grouped kernel takes no float64
    shake(model.parameters(), 0.2)
    return model, target


def output(model):
    if isinstance(model, Attending):
        x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return model(x.to(next(model.parameters()).dtype))
    return model(h.ids(mask=False)["input_ids"]).logits


def recipe(target, rank=2):
    return sm.LoRA(rank=rank, target=target)


def shaken(name, **how):
    model, target = built(name, **how)
    sm.attach(model, recipe(target))
    shake(trained_parameters(model).values(), 0.3)
    return model


@pytest.mark.parametrize("name", CASES)
def test_laws(name, tmp_path):
    model, target = built(name)
    with torch.no_grad():
        base = output(model)
    with h.untouched(model):
        sm.attach(model, recipe(target))
        assert {type(row.site) for row in attachment(model).plan.entries} == {WeightSite}
        # nn.MultiheadAttention takes a fast path where nothing is trained
        assert torch.allclose(output(model), base, atol=1e-12, rtol=0), "B is zero at the start"
        shake(trained_parameters(model).values(), 0.3)
        found = output(model)
        assert not torch.allclose(found, base)
        found.square().sum().backward()
        for tensor, parameter in trained_parameters(model).items():
            assert parameter.grad is not None, tensor
            assert parameter.grad.abs().sum() > 0, tensor
        with sm.disabled(model), torch.no_grad():
            assert torch.allclose(output(model), base, atol=1e-12, rtol=0)
        merged = sm.merge(model)
        assert torch.allclose(output(merged), found, atol=1e-12)
        delta = sm.detach(model)
    sm.attach(model, Delta.load(delta.save(tmp_path / "delta")))
    assert torch.equal(output(model), found)


@pytest.mark.parametrize("name", CASES)
def test_counts_are_the_closed_form(name):
    model = shaken(name)
    wanted = 0
    for row in attachment(model).plan.entries:
        *several, out, wide = model.get_submodule(row.site.path)._parameters[row.site.term].shape
        wanted += (several[0] if several else 1) * 2 * (out + wide)
    assert sum(p.numel() for p in trained_parameters(model).values()) == wanted


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_merged_weight(name):
    model = shaken(name)
    trained = list(trained_parameters(model).values())
    found = torch.autograd.grad(output(model).square().sum(), trained)
    values = folded(model)
    plain = copy.deepcopy(model)
    sm.detach(plain)
    with torch.enable_grad():
        y = torch.func.functional_call(plain, values, *call(plain))
    y = y if isinstance(y, torch.Tensor) else y.logits
    wanted = torch.autograd.grad(y.square().sum(), trained)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


def call(model):
    if isinstance(model, Attending):
        x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return ((x,),)
    return ((h.ids(mask=False)["input_ids"],),)


def test_each_expert_has_its_own_by_a_loop():
    model, _ = built("mixtral")
    sm.attach(model, recipe("experts.gate_up_proj"))
    shake(trained_parameters(model).values(), 0.3)
    values = {n: p.detach() for n, p in trained_parameters(model).items()}
    merged = sm.merge(model)
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts"
        A, B = (values[f"{path}.edits.0-gate_up_proj.{symbol}"] for symbol in "AB")
        weight = merged.get_submodule(path).gate_up_proj
        with sm.disabled(model):
            base = model.get_submodule(path).gate_up_proj.detach()
        for expert in range(4):
            for row in range(0, 48, 7):
                wanted = base[expert, row] + 8 * sum(B[expert, row, r] * A[expert, r] for r in range(2))
                assert torch.allclose(weight[expert, row], wanted, atol=1e-12)


@pytest.mark.parametrize("name", ["mixtral", "mamba"])
def test_under_checkpointing_the_gradients_are_the_same(name):
    model = shaken(name)
    trained = list(trained_parameters(model).values())
    wanted = torch.autograd.grad(output(model).square().sum(), trained)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    found = torch.autograd.grad(output(model).square().sum(), trained)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_in_bfloat16():
    model = shaken("mixtral", dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in trained_parameters(model).values())
    output(model).float().square().sum().backward()
    assert all(p.grad is not None for p in trained_parameters(model).values())


def test_it_trains_beside_others():
    model, _ = built("mixtral", dtype=torch.float32)
    both = sm.parse("LN() + LoRA(rank=2) + LoRA(rank=2, target='experts.down_proj')")
    sm.attach(model, both)
    shake(trained_parameters(model).values(), 0.1)
    merged = sm.merge(model)
    assert torch.allclose(output(merged), output(model), atol=1e-5)


def test_sums_of_experts():
    model, target = built("mixtral")
    deltas = []
    for seed in range(2):
        sm.attach(model, recipe(target))
        shake(trained_parameters(model).values(), 0.3, seed=seed)
        deltas.append(sm.detach(model))
    values = []
    for delta in deltas:
        with sm.attached(model, delta):
            values.append({n: v.detach() for n, v in folded(model).items()})
    with sm.attached(model, 0.25 * deltas[0] + deltas[1]):
        found = {n: v.detach() for n, v in folded(model).items()}
    for name, value in found.items():
        base = model.get_parameter(name).detach()
        assert torch.allclose(value - base, 0.25 * (values[0][name] - base) + values[1][name] - base, atol=1e-12)


def test_fisher_of_experts_is_that_of_single_examples(tmp_path):
    config = T.MixtralConfig(**SMALL, **MOE, vocab_size=len(h.WORDS), num_local_experts=4, pad_token_id=0, num_labels=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T.AutoModelForSequenceClassification.from_config(config).eval()
    shake(model.parameters(), 0.2)
    task = h.task(tmp_path / "task")
    sm.attach(model, recipe("experts.down_proj"))
    shake(trained_parameters(model).values(), 0.3)
    delta = sm.detach(model)
    found = sm.fisher(model, task, delta=delta, examples=32, tokenizer=h.tokenizer())
    rows, collate = task.encode(h.tokenizer(), "train"), task.collator(h.tokenizer())
    sm.attach(model, delta)
    wanted = {n: torch.zeros_like(p) for n, p in trained_parameters(model).items() if ".edits." in n}
    for row in rows:
        batch = collate([row])
        labels = batch.pop("labels")
        loss = torch.nn.functional.cross_entropy(model(**batch).logits, labels)
        grads = torch.autograd.grad(loss, [trained_parameters(model)[n] for n in wanted])
        for name, grad in zip(wanted, grads, strict=True):
            wanted[name] += grad**2 / len(rows)
    for name, value in wanted.items():
        assert value.sum() > 0
        assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-9)


def test_what_is_refused(tmp_path):
    model, _ = built("mixtral")
    cases = {
        "LoRA(target='experts.down_proj', dropout=0.1)": "drops inputs",
        "LoRA(target='experts.down_proj') + Full(target='experts')": "trains .*down_proj and",
        "DoRA(target='experts.down_proj')": "which is no linear map but several weights stacked",
        "LoRA(target='experts.down_projection')": "which this model does not have",
        "LoRA(target='experts.down_proj', rank=20)": "above the smaller side",
    }
    for spelled, said in cases.items():
        with pytest.raises((PlanError, sm.SmidgenError), match=said):
            sm.plan(model, spelled)
    sm.attach(model, recipe("experts.down_proj"))
    with pytest.raises(DeltaError, match="is not written in PEFT's format"):
        to_peft(sm.detach(model), model, tmp_path)


def test_a_name_of_a_weight_does_not_stand_for_maps_of_that_ending():
    """Old files of LoRA(target='down_proj') keep their plan: a weight is named with its module."""
    model, _ = built("mixtral")
    with pytest.raises(PlanError, match="no linear map but several weights stacked"):
        sm.plan(model, "LoRA(target='down_proj')")
