"""LoRA at an embedding: W[i] + s B A[:, i], by rows; it trains, merges, narrows, loads; other tables are refused."""

import pytest
import torch
import transformers as T

import smidgen as sm
from smidgen.common.errors import DeltaError, PlanError
from smidgen.delta.hf_peft.conversion import to_peft
from smidgen.importance.fisher_information import attached_fisher
from smidgen.planning.resolution import resolve
from smidgen.ports.attachment_record import trained_parameters
from smidgen.ports.in_place.untying import UntiedWarning
from smidgen.testing.cases import shake
from tests import helpers as h
from tests.test_fisher import whole
from tests.test_fisher_rules import agree, one_by_one, text_model

WORDS = len(h.WORDS)
AT = {
    "bert": "LoRA(rank=2, target='word_embeddings')",
    "gpt2": "LoRA(rank=2, target=('wte', 'query'))",
    "llama": "LoRA(rank=2, target='embed_tokens') + LN()",
}


def of(kind, **options):
    return h.build(kind, **options).double()


def test_counts_by_hand():
    assert resolve(of("bert"), AT["bert"]).trained == 2 * (WORDS + 16)
    assert resolve(of("bert"), "LoRA(rank=3, target=('word_embeddings', 'position_embeddings'))").trained == 3 * (
        WORDS + 16 + 40 + 16
    )
    assert resolve(of("gpt2"), AT["gpt2"]).trained == 2 * (WORDS + 16) + 2 * 2 * (16 + 16)
    assert resolve(of("bert"), AT["bert"]).lowest == "embeddings"
    assert resolve(of("bert"), AT["bert"]).left_out == ()


@pytest.mark.parametrize("kind", AT)
def test_it_adds_to_each_row(kind):
    """Against a base whose table has the product added to it, value for value; and gradients of that table's."""
    model, inputs = of(kind), h.ids(mask=kind == "bert")
    twin = h.twin(model)
    sm.attach(model, AT[kind].split(" + ")[0].replace(", 'query'", ""))
    shake(trained_parameters(model).values(), 0.3)
    path = next(n for n, _ in model.named_modules() if n.endswith(("word_embeddings", "wte", "embed_tokens")))
    edit = model.get_submodule(path).edits["0"]
    table = twin.get_submodule(path).weight
    with torch.no_grad():
        table += 8 * (edit.B @ edit.A).T  # s = 16 / 2
        for name, p in trained_parameters(model).items():
            if ".edits." not in name:
                twin.get_parameter(name).copy_(p)
    torch.testing.assert_close(h.logits(model, **inputs), h.logits(twin, **inputs), rtol=0, atol=1e-10)
    for one in (model, twin):
        one(**inputs).logits.square().sum().backward()
    torch.testing.assert_close(edit.A.grad, 8 * edit.B.T @ table.grad.T, rtol=0, atol=1e-9)
    torch.testing.assert_close(edit.B.grad, 8 * table.grad.T @ edit.A.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("recipe", [AT["bert"], AT["bert"] + " | Select('random', keep=0.5)"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_it_trains_merges_and_loads(recipe, dtype, tmp_path):
    model = of("bert").to(dtype)
    model.train()
    start, inputs = h.logits(model, **h.ids()), h.ids()
    twin = h.twin(model)
    with h.untouched(model):
        sm.attach(model, recipe)
        if dtype == torch.float64:
            assert torch.equal(h.logits(model, **inputs), start)
        step = sm.optimizer(model, 1e-2)
        for _ in range(4):
            model(**inputs, labels=torch.tensor([0, 1, 0])).loss.backward()
            step.step()
            step.zero_grad()
        after = h.logits(model, **inputs)
        if dtype == torch.float64:
            torch.testing.assert_close(h.logits(sm.merge(model), **inputs), after, rtol=0, atol=1e-10)
        delta = sm.detach(model)
    delta.save(tmp_path / "d")
    sm.attach(twin, sm.Delta.load(tmp_path / "d"))
    assert torch.equal(h.logits(twin, **inputs), after)


def test_pefts_format_has_it_otherwise(tmp_path):
    model = sm.attach(h.bert(), AT["bert"])
    with pytest.raises(DeltaError, match="word_embeddings, no linear map, is not written in PEFT's format"):
        to_peft(sm.detach(model), model, tmp_path)


def test_fit_and_the_sum_of_two(tmp_path):
    task, model = h.task(tmp_path), h.bert()
    deltas = [sm.fit(model, AT["bert"], task, tokenizer=h.tokenizer(), epochs=2, seed=s) for s in (0, 1)]
    total = deltas[0] + deltas[1]
    assert total.on(model) is not None


def test_merging_unties_an_output_layer():
    model = h.causal("gpt2").double()
    assert model.lm_head.weight is model.transformer.wte.weight
    sm.attach(model, "LoRA(rank=2, target='wte')")
    shake(trained_parameters(model).values(), 0.3)
    with pytest.warns(UntiedWarning, match="unties"):
        merged = sm.merge(model)
    inputs = h.ids(mask=False)
    torch.testing.assert_close(h.logits(merged, **inputs), h.logits(model, **inputs), rtol=0, atol=1e-10)


def test_exact_fisher_information(tmp_path):
    model, task = text_model("bert"), h.task(tmp_path)
    sm.attach(model, AT["bert"])
    shake((p for n, p in trained_parameters(model).items() if ".edits." in n), 0.3)
    found = attached_fisher(model, task, tokenizer=h.tokenizer(), examples=4)
    agree(found, one_by_one(model, whole(task, 4)))


def test_a_table_with_a_scale_is_refused():
    """Gemma multiplies what it looks up, so an edit behind it would not be the one that merges."""
    with torch.device("meta"):
        model = T.AutoModelForCausalLM.from_config(T.Gemma3TextConfig(**h.BASE, **h.TOKENS, head_dim=8))
    with pytest.raises(PlanError, match="no linear map but an embedding"):
        resolve(model, "LoRA(target='embed_tokens')")
