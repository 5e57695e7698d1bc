"""BitFit trains all that is a bias, also those that stand beside the maps: right ones, counted by hand; no tables."""

import pytest
import torch
import transformers as T

import smidgen as sm
from smidgen.common.errors import PlanError
from smidgen.importance.fisher_information import attached_fisher
from smidgen.planning.resolution import resolve
from smidgen.recipe.recipe import Term
from smidgen.sites.module_kinds import is_bias
from smidgen.steps.gradient_checks import IdleWarning
from smidgen.steps.optimizer_groups import optimizer
from smidgen.testing.cases import shake
from tests import helpers as h
from tests.test_fisher import whole
from tests.test_fisher_rules import agree, one_by_one

W, F, WORDS, E = 16, 24, len(h.WORDS), 3
OSS = {"num_local_experts": E, "num_experts_per_tok": 2, "num_key_value_heads": 1, "head_dim": 8}
XLNET = {"d_model": W, "n_layer": 2, "n_head": 2, "d_inner": F, "vocab_size": WORDS, "pad_token_id": 0}
CONFIGS = {
    "deberta": lambda: T.DebertaConfig(**h.BASE, pad_token_id=0),
    "xlnet": lambda: T.XLNetConfig(**XLNET),
    "gpt_oss": lambda: T.GptOssConfig(**h.BASE, **h.TOKENS, **OSS),
}
# values of a block, of what lies before the blocks; and of those beside the maps, in a block
COUNTS = {
    "deberta": (2 * W + 2 * W + F + 2 * W, W, {"q_bias": W, "v_bias": W}),
    "xlnet": (3 * W + W + F + W + W, 0, {"r_w_bias": W, "r_r_bias": W, "r_s_bias": W}),
    "gpt_oss": (W + 8 + 8 + W + E + E * (2 * F + W), 0, {"gate_up_proj_bias": E * 2 * F, "down_proj_bias": E * W}),
}


def model_of(name, dtype=torch.float64):
    """A shaken classifier in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T.AutoModelForSequenceClassification.from_config(CONFIGS[name]()).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the other knows no float64
    shake(model.parameters(), 0.3)
    return model.to(dtype)


def given(name):
    """Ids; XLNet's r_s_bias belongs to segments."""
    inputs = h.ids(mask=False)
    segments = {"token_type_ids": inputs["input_ids"] % 2} if name == "xlnet" else {}
    return {"input_ids": inputs["input_ids"], **segments}


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_by_hand(name):
    block, before, beside = COUNTS[name]
    model = model_of(name)
    plan = resolve(model, "BitFit()")
    assert plan.trained == before + 2 * block
    found = {n.rpartition(".")[2]: p for n, p in plan.shapes.items()}
    assert {n: torch.Size(found[n]).numel() for n in beside} == beside
    assert resolve(model, "BitFit(layers=1)").trained == block
    assert resolve(model, "BitFit(beside=False)").trained == before + 2 * (block - sum(beside.values()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", ["BitFit()", "BitFit() | Select('random', keep=0.5)"])
@pytest.mark.parametrize("name", CONFIGS)
def test_they_train_act_merge_and_come_off(name, recipe, dtype):
    model, inputs = model_of(name, dtype), given(name)
    twin = h.twin(model)
    with h.untouched(model):
        sm.attach(model, recipe)
        step = optimizer(model, 1e-2)
        for _ in range(3):
            model(**inputs, labels=torch.tensor([0, 1, 0])).loss.backward()
            step.step()
            step.zero_grad()
        after = h.logits(model, **inputs)
        if dtype == torch.float64:  # another would round
            torch.testing.assert_close(h.logits(sm.merge(model), **inputs), after, rtol=0, atol=1e-10)
        delta = sm.detach(model)
    for term in COUNTS[name][2]:
        moved = [n for n, t in delta.tensors.items() if n.endswith(term)]
        assert len(moved) >= 2, term
    sm.attach(twin, delta)
    assert torch.equal(h.logits(twin, **inputs), after)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_gets_the_gradient_of_the_bases_own_tensor(name):
    model, inputs = model_of(name), given(name)
    twin = h.twin(model)
    sm.attach(model, "BitFit()")
    for one in (model, twin):
        one(**inputs, labels=torch.tensor([0, 1, 0])).loss.backward()
    for term in COUNTS[name][2]:
        mine, theirs = ([p.grad for n, p in m.named_parameters() if n.endswith(term)] for m in (model, twin))
        assert len(mine) == 2
        assert all(float(g.abs().max()) > 0 for g in theirs)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_a_bias_of_an_input_that_the_task_lacks_may_idle(tmp_path):
    """XLNet's r_s_bias belongs to segments; without them the others train and a warning names it."""
    model = model_of("xlnet", torch.float32)
    task = h.task(tmp_path)
    with pytest.warns(IdleWarning, match="r_s_bias"):
        sm.fit(model, "BitFit()", task, tokenizer=h.tokenizer(), epochs=1, batch_size=8)


@pytest.mark.parametrize("name", ["deberta", "gpt_oss"])
def test_exact_fisher_information_of_them(name, tmp_path):
    model, task = model_of(name), h.task(tmp_path)
    model.config.pad_token_id = 0
    sm.attach(model, "BitFit(norms=False)")
    found = attached_fisher(model, task, tokenizer=h.tokenizer(), examples=4)
    agree(found, one_by_one(model, whole(task, 4)), 1e-5)


def test_what_is_a_bias_by_its_name():
    yes = "bias q_bias r_w_bias gate_up_proj_bias dt_bias pos_bias_u bias_v bias_k bias_ih_l0 in_proj_bias logit_bias"
    no = (
        "weight gain biased relative_attention_bias relative_position_bias_table attention_biases position_bias "
        "e_score_correction_bias expert_bias latent_bias_factor"
    )
    assert [name for name in yes.split() if not is_bias(name)] == []
    assert [name for name in no.split() if is_bias(name)] == []


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_dense_layers": 1, "head_dim": 8}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4}
LEVIT = {
    "image_size": 32,
    "hidden_sizes": [16] * 3,
    "num_attention_heads": [2] * 3,
    "depths": [1] * 3,
    "key_dim": [8] * 3,
}
LEFT = {
    "relative_position_bias_table": lambda: T.SwinConfig(**SWIN),
    "attention_biases": lambda: T.LevitConfig(**LEVIT),
    "expert_bias": lambda: T.AfmoeConfig(**h.BASE, **h.TOKENS, **MOE),
    "e_score_correction_bias": lambda: T.Ernie4_5_MoeConfig(**h.BASE, **h.TOKENS, moe_num_experts=4, use_bias=True),
}


@pytest.mark.parametrize("left", LEFT)
def test_tables_and_corrections_are_left(left):
    with torch.device("meta"):
        model = T.AutoModel.from_config(LEFT[left]())
    assert any(name.endswith(left) for name, _ in model.named_parameters())
    try:
        found = resolve(model, "BitFit()").shapes
    except PlanError as refused:
        assert "has a bias" in str(refused)  # noqa: PT017
        return
    assert not any(name.endswith(left) for name in found)


def test_a_file_from_before_has_those_of_maps_and_norms():
    old = Term.from_json({"name": "BitFit", "norms": True, "layers": None})
    assert str(old) == "BitFit(beside=False)"
