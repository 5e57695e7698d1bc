"""Vectors among the embedded tokens: the same as feeding tokens with these vectors, in every kind of model and pass."""

import copy

import pytest
import torch
import transformers as T

import smidgen as sm
from smidgen.common.errors import AttachError, PlanError, RecipeError
from smidgen.efficiency.prefix_cache.cut_point import why_not
from smidgen.ports.attachment_record import trained_parameters
from tests import helpers as h
from tests.test_prefix import FAMILIES, family

CLS = ("bert", "roberta", "distilbert", "electra")
CAUSAL = ("llama", "gpt2", "qwen3", "opt")
PROMPT = torch.tensor([11, 12, 13])
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


def with_tokens(model, ids=PROMPT):
    """The model with the embeddings of some tokens as its prompt."""
    sm.attach(model, sm.PromptTuning(len(ids)))
    ((name, P),) = [(n, p) for n, p in trained_parameters(model).items() if "edits" in n]
    path = name.partition(".edits.")[0]
    with torch.no_grad():
        weight = model.get_submodule(path)
        P.copy_(getattr(weight, "embed_scale", 1.0) * weight.weight[ids])
    return model


def fed(ids, mask, at):
    """Ids and mask with the prompt's tokens put in."""
    room, ones = PROMPT.expand(len(ids), -1), torch.ones(len(ids), len(PROMPT), dtype=torch.long)
    return (
        torch.cat((ids[:, :at], room, ids[:, at:]), 1),
        torch.cat((mask[:, :at], ones, mask[:, at:]), 1),
    )


@pytest.mark.parametrize("name", CLS + CAUSAL)
def test_a_prompt_of_tokens_vectors_is_these_tokens(name):
    model, inputs, _ = family(name)
    ids, at = inputs["input_ids"], 1 if name in CLS else 0
    ids = torch.where(MASK.bool(), ids, model.config.pad_token_id or 0)
    longer, wide = fed(ids, MASK, at)
    expected = h.logits(model, input_ids=longer, attention_mask=wide)
    expected = torch.cat((expected[:, :at], expected[:, at + 3 :]), 1)
    with_tokens(model)
    found = h.logits(model, input_ids=ids, attention_mask=MASK)
    assert found.shape[1] == 7
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_sees_the_prompt_as_it_sees_tokens(name):
    model, inputs, _ = family(name)
    ids, decoder = inputs["input_ids"], inputs["decoder_input_ids"]
    longer, wide = fed(ids, MASK, 0)
    expected = h.logits(model, input_ids=longer, attention_mask=wide, decoder_input_ids=decoder)
    with_tokens(model)
    found = h.logits(model, input_ids=ids, attention_mask=MASK, decoder_input_ids=decoder)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "albert", "deberta-v2", "llama", "gpt2"])
def test_a_classifier_reads_its_own_token(kind):
    model = h.build(kind).double()
    model.config.pad_token_id = 1 if kind == "roberta" else 0
    ids, mask = h.ids()["input_ids"], h.ids()["attention_mask"]
    ids = torch.where(mask.bool(), ids, model.config.pad_token_id)
    longer, wide = fed(ids, mask, 0 if kind in ("llama", "gpt2") else 1)
    expected = h.logits(model, input_ids=longer, attention_mask=wide)
    found = h.logits(with_tokens(model), input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_pooling_is_over_the_text(pooling):
    model = h.bert().double()
    ids, mask = h.ids()["input_ids"], h.ids()["attention_mask"]
    plain = copy.deepcopy(model)
    sm.attach(model, sm.PromptTuning(3), pooling=pooling)
    P = trained_parameters(model)["bert.embeddings.word_embeddings.edits.0.P"]
    with torch.no_grad():
        P.copy_(plain.bert.embeddings.word_embeddings.weight[PROMPT])
        hidden = plain.bert(*fed(ids, mask, 1)).last_hidden_state
        hidden = torch.cat((hidden[:, :1], hidden[:, 4:]), 1)
        rows = [x[m.bool()] for x, m in zip(hidden, mask, strict=True)]
        pooled = torch.stack([x.mean(0) if pooling == "mean" else x[-1] for x in rows])
        expected = plain.classifier(pooled)
    torch.testing.assert_close(h.logits(model), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "bart"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generating_is_as_with_tokens(name, use_cache):
    model, inputs, _ = family(name)
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0  # padding on the left
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 1, "use_cache": use_cache}
    longer, wide = fed(ids, mask, 0)
    expected = model.generate(input_ids=longer, attention_mask=wide, **options)
    with_tokens(model)
    found = model.generate(input_ids=ids, attention_mask=mask, **options)
    own = 0 if name in ("t5", "bart") else 3
    assert torch.equal(found[:, -5:], expected[:, -5:])
    assert found.shape[1] == expected.shape[1] - own


def test_without_padding_generation_needs_no_mask():
    model, inputs, _ = family("llama")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    ids = inputs["input_ids"]
    expected = model.generate(input_ids=fed(ids, ids, 0)[0], **options)
    assert torch.equal(with_tokens(model).generate(input_ids=ids, **options)[:, -4:], expected[:, -4:])


def test_the_loss_is_of_the_text():
    model, inputs, _ = family("llama")
    ids = inputs["input_ids"]
    with_tokens(model)
    output = model(input_ids=ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected, check_dtype=False, rtol=1e-5, atol=1e-6)


def test_embedded_inputs_get_the_prompt_too():
    model, inputs, _ = family("llama")
    with_tokens(model)
    embedded = model.model.embed_tokens.weight[inputs["input_ids"]].detach()
    torch.testing.assert_close(h.logits(model, inputs_embeds=embedded), h.logits(model, **inputs), rtol=1e-9, atol=1e-9)


def test_token_types_and_hidden_states_have_the_texts_length():
    model = h.bert()
    sm.attach(model, "PromptTuning(length=2)")
    inputs = h.ids()
    output = model(**inputs, token_type_ids=torch.zeros_like(inputs["input_ids"]), output_hidden_states=True)
    assert {tuple(x.shape) for x in output.hidden_states} == {(3, 7, 16)}


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_one_compiled_graph(name):
    model, inputs, _ = family(name)
    with_tokens(model).requires_grad_(False)
    expected = h.logits(model, **inputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(h.logits(compiled, **inputs), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("vit", "whisper")])
def test_disabled_is_the_base(name):
    model, inputs, _ = family(name)
    base = h.logits(model, **inputs)
    with_tokens(model)
    assert not torch.allclose(h.logits(model, **inputs), base)
    with sm.disabled(model):
        assert torch.equal(h.logits(model, **inputs), base)
    sm.detach(model)
    assert torch.equal(h.logits(model, **inputs), base)


def test_several_prompts_stand_side_by_side():
    model, inputs, _ = family("gpt2")
    with_tokens(model)
    expected = h.logits(model, **inputs)
    sm.detach(model)
    sm.attach(model, sm.PromptTuning(1) + sm.PromptTuning(2))
    with torch.no_grad():
        for i, ids in enumerate((PROMPT[:1], PROMPT[1:])):
            model.transformer.wte.edits[str(i)].P.copy_(model.transformer.wte.weight[ids])
    torch.testing.assert_close(h.logits(model, **inputs), expected, rtol=1e-9, atol=1e-9)


def test_it_starts_at_rows_of_the_vocabulary():
    model = h.bert()
    sm.attach(model, "PromptTuning(length=5)")
    table = model.bert.embeddings.word_embeddings.weight
    P = trained_parameters(model)["bert.embeddings.word_embeddings.edits.0.P"]
    assert all((row == table).all(1).any() for row in P)
    sm.detach(model)
    for seed in range(5):  # all 20 rows once, as in the authors' code; more than there are only with some twice
        sm.attach(model, "PromptTuning(length=20)", seed=seed)
        P = trained_parameters(model)["bert.embeddings.word_embeddings.edits.0.P"]
        assert sorted(P.tolist()) == sorted(table.tolist())
        sm.detach(model)
    sm.attach(model, "PromptTuning(length=25)")
    sm.detach(model)
    sm.attach(model, "PromptTuning(length=5, start='uniform')")
    P = trained_parameters(model)["bert.embeddings.word_embeddings.edits.0.P"]
    assert float(P.detach().abs().max()) <= 0.5
    assert not (P[0] == table).all(1).any()


def test_a_prompt_takes_positions():
    with pytest.raises(PlanError, match="the model has 40 positions, so 40 vectors leave none for a text"):
        sm.attach(h.bert(), "PromptTuning(length=40)")
    model = sm.attach(h.bert(), "PromptTuning(length=34)")
    with pytest.raises(AttachError, match="34 and a text of 7 tokens need 41 positions.*max_length=6"):
        h.logits(model)
    roberta = h.build("roberta")  # of 40 rows, positions begin at 1 behind the padding
    with pytest.raises(PlanError, match="the model has 39"):
        sm.attach(roberta, "PromptTuning(length=39)")
    sm.attach(h.causal(), "PromptTuning(length=100)")  # rotary positions have no table


def test_models_without_tokens_are_refused():
    model, _, _ = family("vit")
    with pytest.raises(PlanError, match="it does not embed the tokens of one text"):
        sm.plan(model, "PromptTuning()")


def test_nothing_lies_below_the_embeddings():
    model = h.bert()
    plan = sm.plan(model, "PromptTuning() + LN(layers='top:1')")
    assert plan.lowest == "embeddings"
    sm.attach(model, plan.recipe)
    assert "nothing lies below" in why_not(model, plan)


def test_the_estimate_leaves_room_for_the_prompt():
    costs = sm.plan(h.bert(), "PromptTuning(length=30)", batch_size=2, length=128).costs
    assert costs["length"] == 10


def test_merging_and_wrong_fields_are_one_line():
    model = sm.attach(h.bert(), "PromptTuning(length=2)")
    with pytest.raises(AttachError, match="PromptTuning.*: tokens of its own are no part of a weight"):
        sm.merge(model)
    with pytest.raises(RecipeError, match="length=0"):
        sm.PromptTuning(0)
    with pytest.raises(RecipeError, match="start='vocab' is not one of vocabulary, uniform"):
        sm.PromptTuning(start="vocab")


def test_counts_are_the_closed_form():
    """p d; 7,680 for MiniLM at p = 20."""
    config = T.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    with torch.device("meta"):
        assert sm.plan(T.BertForSequenceClassification(config), "PromptTuning(length=20)").trained == 7_680
