"""plan: its counts on tensors without content are those of a real step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import smidgen as sm
from smidgen.prefix import frozen_prefix
from tests import helpers as h

RECIPES = [
    "LN()",
    "LN(layers='top:1')",
    "LoRA(rank=2)",
    "LoRA(rank=2, target='linear')",
    "BitFit()",
    "IA3()",
    "Full()",
    "Head()",
]


def measured(model, recipe, rows, length):
    """Bytes that a real forward pass keeps for the backward pass, parameters and buffers apart."""
    sm.attach(model, recipe)
    model.train()
    for module in frozen_prefix(model, sm.plan(h.twin(sm_base(model)), recipe)):
        module.eval()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids).logits.float().sum()
    loss.backward()
    return sum(storage.nbytes() for storage in kept.values())


def sm_base(model):
    """A copy of the base of an attached model."""
    copy = h.twin(model)
    sm.detach(copy)
    return copy


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_activation_bytes_are_those_of_a_real_step(recipe, kind):
    build = {"bert": lambda: h.bert(0.1), "gpt2": lambda: h.causal("gpt2")}[kind]
    if recipe == "Head()" and kind == "gpt2":
        pytest.skip("no head to train")
    plan = sm.plan(build(), recipe, batch_size=3, length=11)
    assert plan.costs["activation_bytes"] == measured(build(), recipe, 3, 11)


def test_what_is_below_the_lowest_edit_is_not_kept():
    bytes = {r: sm.plan(h.bert(0.1), r, batch_size=2, length=8).costs["activation_bytes"] for r in RECIPES}
    assert bytes["Head()"] < bytes["LN(layers='top:1')"] < bytes["LN()"] < bytes["Full()"]


def test_the_model_is_not_touched():
    model = h.bert().train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with h.untouched(model):
        plan = sm.plan(model, "LN() + LoRA(rank=2)", pooling="mean", batch_size=2, length=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert plan.pooling == "mean"
    assert "unknown" not in plan.costs


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "roberta", "distilbert", "deberta-v2"])
def test_on_the_meta_device(kind):
    config = h.CONFIGS[kind]()
    with torch.device("meta"):
        model = h.T.AutoModelForSequenceClassification.from_config(config)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    real = h.build(kind, pad_token_id=0) if kind in ("distilbert",) else h.build(kind)
    here, there = (sm.plan(m, "LN() + LoRA(rank=2)", batch_size=2, length=8) for m in (model.eval(), real))
    assert "unknown" not in here.costs, here.costs
    assert here.costs == there.costs
    assert here.shapes == there.shapes
    assert all(p.is_meta for p in model.parameters())


def test_counts_by_hand():
    model = h.bert()
    plan = sm.plan(model, "LN()", batch_size=4, length=8)
    costs, size = plan.costs, sum(p.numel() * 4 for p in model.parameters())
    assert (plan.trained, plan.head_values) == (160, 34)
    assert costs["weights_bytes"] == size
    assert costs["training_state_bytes"] == 16 * (160 + 34)
    assert costs["peak_bytes"] > costs["weights_bytes"] + costs["training_state_bytes"]
    assert (costs["batch_size"], costs["length"]) == (4, 8)
    projections = 2 * (4 * 16 * 16 + 2 * 16 * 24)  # multiplications and additions per token and layer
    attention = 2 * 2 * 8 * 16
    pooler_and_head = 2 * (16 * 16 + 16 * 2) / 8  # once per text
    assert costs["forward_flops_per_token"] == int(2 * (projections + attention) + pooler_and_head)
    full = sm.plan(model, "Full()", batch_size=4, length=8).costs
    assert full["forward_flops_per_token"] == costs["forward_flops_per_token"]
    assert costs["training_flops_per_token"] < 0.75 * full["training_flops_per_token"]


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_work_does_not_depend_on_how_attention_is_computed(kind):
    costs = [
        sm.plan(h.build(kind, attn_implementation=how), "LN()", batch_size=2, length=8).costs
        for how in ("eager", "sdpa")
    ]
    assert costs[0]["forward_flops_per_token"] == costs[1]["forward_flops_per_token"]
    assert costs[0]["training_flops_per_token"] <= costs[1]["training_flops_per_token"] * 1.1


def test_a_low_precision_base_weighs_half():
    wide, low = h.bert(), h.bert().to(torch.bfloat16)
    costs = [sm.plan(model, "LN()", batch_size=2, length=8).costs for model in (wide, low)]
    assert costs[0]["weights_bytes"] == 2 * costs[1]["weights_bytes"]
    assert costs[0]["training_state_bytes"] == costs[1]["training_state_bytes"]


def test_a_length_above_what_the_model_takes_is_cut():
    assert (
        sm.plan(h.bert(), "LN()", batch_size=2, length=41).costs
        == sm.plan(h.bert(), "LN()", batch_size=2, length=40).costs
    )


def test_a_model_that_cannot_be_run():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(x)

    plan = sm.plan(Odd(), "LN()")
    assert plan.trained == 8
    assert list(plan.costs) == ["unknown"]
    assert "input_ids" in plan.costs["unknown"]


def test_a_recipe_that_does_not_fit_is_an_error():
    with pytest.raises(sm.SmidgenError, match="matches no site"):
        sm.plan(h.bert(), "LN(which='qk')")
