"""plan: its counts on tensors without content are those of a real step."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import smidgen as sm
from smidgen.planning.frozen_modules import frozen_prefix
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


def built(config, cls):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(h.T, cls)(config).eval()
    h.shake(model.parameters(), 0.3)
    return model


def mixtral():
    sizes = {**h.BASE, **h.TOKENS, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
    return built(h.T.MixtralConfig(**sizes), "MixtralForCausalLM")


SEEN = {"image_size": 16, "patch_size": 8, **h.SIZES}
MODELS = {
    "experts": mixtral,
    "a decoder": lambda: built(
        h.T.BlenderbotConfig(
            vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=40, **h.TOKENS
        ), "BlenderbotForConditionalGeneration"
    ),
    "images": lambda: built(h.T.ViTConfig(**SEEN), "ViTForImageClassification"),
    "images of a hierarchy": lambda: built(
        h.T.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=16, patch_size=4),
        "ConvNextForImageClassification",
    ),
    "images and text": lambda: built(
        h.T.CLIPConfig(
            text_config={**h.BASE, **h.TOKENS}, vision_config=SEEN, projection_dim=8
        ), "CLIPModel"
    ),
    "samples of sound": lambda: built(
        h.T.Wav2Vec2Config(
            **h.SIZES, vocab_size=20, conv_dim=(8,), conv_kernel=(10,), conv_stride=(64,), num_feat_extract_layers=1,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, layerdrop=0.0
        ), "Wav2Vec2ForSequenceClassification"
    ),
    "features of sound": lambda: built(
        h.T.WhisperConfig(
            vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, num_mel_bins=4,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=20,
            max_target_positions=40, **h.TOKENS
        ), "WhisperForConditionalGeneration"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_costs_are_known_whatever_a_model_reads(name, capfd):
    model = MODELS[name]()
    with h.untouched(model):
        costs = sm.plan(model, "LN()", batch_size=2, length=8).costs
    assert "unknown" not in costs, costs
    unit = "example" if name.startswith(("images of", "samples")) or name == "images" else "token"
    unit = "example" if name == "features of sound" else unit
    assert ("length" in costs) == (unit == "token")
    assert costs[f"training_flops_per_{unit}"] > costs[f"forward_flops_per_{unit}"] > 0
    assert costs["peak_bytes"] > costs["weights_bytes"] + costs["training_state_bytes"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("recipe", ["LN()", "LoRA(rank=2)", "LN(layers='top:1')"])
def test_experts_are_counted_as_they_run(recipe):
    """Activations are those of a real step; FLOPs are of the two experts that a token meets, out of three."""
    costs = sm.plan(mixtral(), recipe, batch_size=3, length=11).costs
    assert costs["activation_bytes"] == measured(mixtral(), recipe, 3, 11)
    attention = 2 * (2 * 16 * 16 + 2 * 16 * 8) + 2 * 2 * 11 * 16
    block = attention + 2 * (16 * 3 + 2 * 3 * 16 * 24)
    low = {"LN()": 0, "LN(layers='top:1')": 0, "LoRA(rank=2)": 2 * 2 * ((16 + 16) + (16 + 8))}[recipe]
    assert costs["forward_flops_per_token"] == 2 * (block + low) + 2 * 16 * len(h.WORDS)


def test_the_work_on_experts_that_are_trained_is_counted():
    """Their gradients take as much as their outputs: forward, and twice that backward."""
    costs = sm.plan(mixtral(), "Full()", batch_size=2, length=8).costs
    assert costs["training_flops_per_token"] > 2.7 * costs["forward_flops_per_token"]


def wav2vec2(**more):
    torch.manual_seed(0)
    config = T.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, classifier_proj_size=8, num_labels=3, **more,
    )  # fmt: skip
    return T.Wav2Vec2ForSequenceClassification(config).eval()


def bart(drop):
    torch.manual_seed(0)
    config = T.BartConfig(
        vocab_size=len(h.WORDS), d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=40,
        encoder_layerdrop=drop, decoder_layerdrop=drop,
    )  # fmt: skip
    return T.BartModel(config).eval()


@pytest.mark.parametrize("recipe", ["LN()", "LoRA(rank=2)", "Full()"])
def test_a_layer_that_is_left_out_at_random_is_counted_as_computed(recipe):
    """LayerDrop (Fan et al. 2019): the most that a step takes."""
    all_of_them, most = (sm.plan(wav2vec2(layerdrop=p), recipe, batch_size=2, length=800).costs for p in (0.0, 0.5))
    assert "unknown" not in most, most
    assert most == all_of_them
    barts = [sm.plan(bart(p), recipe, batch_size=2, length=8).costs for p in (0.0, 0.5)]
    peaks = [costs.pop("peak_bytes") for costs in barts]
    assert barts[0] == barts[1]
    assert abs(peaks[0] - peaks[1]) <= 16  # the draws themselves


@pytest.mark.parametrize("samples", [800, 1600])
def test_a_sound_is_counted_at_its_length(samples):
    model = wav2vec2(layerdrop=0.0, apply_spec_augment=False, attn_implementation="eager")
    costs = sm.plan(model, "LN()", batch_size=2, length=samples).costs
    assert (costs["batch_size"], costs["samples"]) == (2, samples)
    sm.attach(model, "LN()")
    model.train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_values=torch.zeros(2, samples)).logits.float().sum()
    loss.backward()
    assert costs["activation_bytes"] == sum(storage.nbytes() for storage in kept.values())


class Reads(nn.Module):
    """Its work depends on what it reads."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)

    def forward(self, input_ids):
        return (self.norm(self.embedding(input_ids[input_ids > 3])),)


def test_what_cannot_be_counted_says_why_in_words(capfd):
    costs = sm.plan(Reads(), "LN()").costs
    assert costs == {"unknown": "its forward pass depends on values, which tensors without content have not"}
    assert capfd.readouterr() == ("", "")


def test_a_model_that_knows_no_longest_text():
    """XLNet's configuration says -1."""
    config = T.XLNetConfig(vocab_size=30, d_model=16, n_layer=1, n_head=2, d_inner=24)
    assert config.max_position_embeddings == -1
    assert sm.plan(T.XLNetForSequenceClassification(config), "LN()", length=24).costs["length"] == 24
