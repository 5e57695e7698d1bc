"""Models that compute in ways of their own: Reformer's reversible blocks, MRA's kernel."""

from collections import namedtuple

import pytest
import torch
import transformers as T
from transformers.models.mra import modeling_mra

import smidgen as sm
from smidgen.common.errors import PlanError, TrainError
from smidgen.common.hook_types import first_of, like
from smidgen.planning.frozen_modules import frozen_prefix
from smidgen.planning.resolution import resolve
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.testing.cases import shake
from tests import helpers as h

SIZES = {
    "attention_head_size": 8, "attn_layers": ["local", "local"], "axial_pos_embds": False, "feed_forward_size": 24,
    "hidden_size": 16, "num_attention_heads": 2, "local_attn_chunk_length": 4, "max_position_embeddings": 64,
    "vocab_size": 30, "is_decoder": False, "hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0,
}  # fmt: skip
RECIPES = ("LoRA(rank=2)", "LoRA(rank=2, target='linear')", "IA3()", "LoRA(rank=2, layers=1)", "LN(layers=1)")


def reformer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T.ReformerForMaskedLM(T.ReformerConfig(**SIZES)).double()
    shake(model.parameters(), 0.2)
    return model


def loss(model, ids):
    return model(input_ids=ids).logits.square().mean()


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_those_of_differences(recipe):
    model, ids = reformer(), torch.arange(1, 17).view(2, 8)
    sm.attach(model, recipe)
    trained = trained_parameters(model)
    shake(trained.values(), 0.2)
    model.train()
    for module in frozen_prefix(model, attachment(model).plan):
        module.eval()
    loss(model, ids).backward()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trained.items():
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter += step * direction
                values.append(loss(model, ids))
                parameter -= step * direction
        wanted = (values[0] - values[1]) / 2e-5
        assert torch.allclose((parameter.grad * direction).sum(), wanted, rtol=1e-4, atol=1e-8), name
        assert parameter.grad.any(), name


def test_nothing_flows_below_and_nothing_is_left():
    model, ids = reformer(), torch.arange(1, 17).view(2, 8)
    encoder, seen = model.reformer.encoder, []
    encoder.register_forward_pre_hook(lambda m, a, k: seen.append(k["hidden_states"].requires_grad), with_kwargs=True)
    hooks = len(encoder._forward_pre_hooks)
    with h.untouched(model):
        sm.attach(model, "LoRA(rank=2)")
        model.train()
        loss(model, ids).backward()
        assert all(p.grad is None for n, p in model.named_parameters() if ".edits." not in n)
        sm.detach(model)
    assert len(encoder._forward_pre_hooks) == hooks
    sm.attach(model, "LN(layers=0)")
    assert len(encoder._forward_pre_hooks) == hooks + 1
    sm.detach(model)
    sm.attach(model, "Full(target='lm_head')")
    assert len(encoder._forward_pre_hooks) == hooks, "no gradient is asked for below what is trained"
    assert seen == [False]


def test_fit_says_that_its_batches_do_not_fit(tmp_path):
    config = T.ReformerConfig(**{**SIZES, "vocab_size": len(h.WORDS)}, num_labels=2, pad_token_id=0)
    with pytest.raises(TrainError, match="ReformerEncoder trains on texts whose length is a multiple of its chunks"):
        sm.fit(T.ReformerForSequenceClassification(config), "LN()", h.task(tmp_path / "t"), tokenizer=h.tokenizer())


def mra():
    sizes = {key: SIZES[key] for key in ("hidden_size", "num_attention_heads", "vocab_size")}
    return T.MraForMaskedLM(T.MraConfig(**sizes, num_hidden_layers=2, intermediate_size=24))


@pytest.mark.parametrize("recipe", ["LoRA(rank=2)", "DoRA(rank=2)", "PromptTuning(length=3)", "LN() + LoRA(rank=2)"])
def test_an_attention_without_its_kernel(recipe, monkeypatch):
    """MRA's gives zeros, so nothing that is added in it would ever move."""
    model = mra()
    with pytest.raises(PlanError, match=r"MraSelfAttention gives zeros without its CUDA kernel \(mra_cuda_kernel is "):
        resolve(model, recipe)
    assert resolve(model, "LN()").trained
    assert resolve(model, "LoRA(rank=2, target=('query', 'ff_in'))").trained, "something has an effect"
    monkeypatch.setattr(modeling_mra, "mra_cuda_kernel", object())
    assert resolve(model, recipe).trained


def test_a_block_that_gives_a_named_tuple_keeps_it():
    """Reformer's stack reads what its blocks give by name."""
    Output = namedtuple("Output", ["states", "buckets"])
    one, two = torch.zeros(2), torch.ones(2)
    output = Output(one, None)
    found = like(output, two, first_of(output)[1])
    assert type(found) is Output
    assert found.states is two
    assert type(like((one, None), two, (None,))) is tuple
    assert like(one, two, ()) is two
