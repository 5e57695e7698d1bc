"""What a checkpoint lacked is trained and saved, wherever it lies: task heads, poolers, modules of one's own."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as T
from torch import nn

import smidgen as sm
from smidgen.common.errors import DeltaError, PlanError, RecipeError
from smidgen.delta.fingerprint import Fingerprint
from smidgen.planning.frozen_modules import frozen_prefix
from smidgen.planning.resolution import resolve
from smidgen.ports.attachment_record import trained_parameters
from smidgen.recipe.recipe import Term
from smidgen.sites.new_tensors import new_names, resized
from smidgen.sites.task_head import head_names
from smidgen.steps.gradient_checks import check_gradients, still
from smidgen.testing.cases import shake
from tests import helpers as h

BERT_POOLER = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
CLASSIFIER = ("classifier.weight", "classifier.bias")


def saved(folder, kind, cls, **options):
    """A checkpoint of a tiny model of another class, in a folder."""
    h.build(kind, cls, **options).save_pretrained(folder)
    return folder


def read(cls, folder, seed=0, **options):
    """A plain from_pretrained, as in a new process: what the checkpoint lacks is drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(T, cls).from_pretrained(folder, **options).eval()


def trained(model, recipe="LN()", **options):
    """A delta with shaken values, and what the model said with it."""
    sm.attach(model, recipe, **options)
    shake(trained_parameters(model).values(), 0.3)
    return h.logits(model), sm.detach(model)


# Classes without a base model of their own, or with the head in it


def clip_config(**options):
    side = {**h.SIZES, "projection_dim": 8}
    vision = {**side, "image_size": 8, "patch_size": 4}
    return T.CLIPConfig(text_config={**side, **h.TOKENS, "vocab_size": 20}, vision_config=vision, **options)


PIXELS = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


def test_the_head_of_a_class_without_a_base_model_is_trained_and_saved(tmp_path):
    T.CLIPModel(clip_config(projection_dim=8)).save_pretrained(tmp_path)
    model = read("CLIPForImageClassification", tmp_path, num_labels=3)
    sm.attach(model, "LN()")
    assert model.classifier.weight.requires_grad
    assert not model.vision_model.encoder.layers[0].mlp.fc1.weight.requires_grad
    shake(trained_parameters(model).values(), 0.3)
    wanted, delta = h.logits(model, **PIXELS), sm.detach(model)
    assert delta.head == CLASSIFIER
    with sm.attached(read("CLIPForImageClassification", tmp_path, seed=7, num_labels=3), delta) as again:
        assert torch.equal(h.logits(again, **PIXELS), wanted)
    assert head_names(h.twin(model)) == CLASSIFIER, "a copy has lost the marks of loading"


def tiny(config):
    """Shrink what a configuration makes deep; widths stay."""
    for part in (config, *(v for v in vars(config).values() if isinstance(v, T.PretrainedConfig))):
        for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, 2)
    return config


SAMPLE = [
    "CLIPForImageClassification", "SiglipForImageClassification", "MetaClip2ForImageClassification",
    "PerceiverForSequenceClassification", "PerceiverForImageClassificationLearned", "WhisperForAudioClassification",
    "T5ForQuestionAnswering", "UMT5ForQuestionAnswering", "T5ForSequenceClassification", "T5ForTokenClassification",
    "BartForSequenceClassification", "ViTForImageClassification", "BeitForImageClassification",
    "ConvNextForImageClassification", "SwinForImageClassification", "Dinov2ForImageClassification",
    "Wav2Vec2ForSequenceClassification", "HubertForSequenceClassification", "ASTForAudioClassification",
    "WavLMForAudioFrameClassification", "VivitForVideoClassification", "LlamaForSequenceClassification",
    "GPT2ForTokenClassification", "XLNetForSequenceClassification", "RoFormerForTokenClassification",
    "LongformerForSequenceClassification", "ModernBertForTokenClassification", "CanineForSequenceClassification",
    "ReformerForSequenceClassification", "LayoutLMv3ForTokenClassification", "BertForQuestionAnswering",
    "DebertaV2ForSequenceClassification",
]  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
def test_the_layer_as_wide_as_the_labels_is_trained(name):
    cls = getattr(T, name)
    config = tiny(cls.config_class())
    config.num_labels = 5
    with torch.device("meta"):
        model = cls(config)
    wide = [n for n, p in model.named_parameters() if p.shape[:1] == (5,)]
    sm.attach(model, "LN()")
    assert wide
    assert all(model.get_parameter(n).requires_grad for n in wide)


@pytest.mark.parametrize("name", ["HGNetV2ForImageClassification"])
def test_the_head_of_a_backbone_without_norms_is_found(name):
    cls = getattr(T, name)
    with torch.device("meta"):
        model = cls(cls.config_class(num_labels=5))
    wide = tuple(n for n, p in model.named_parameters() if p.shape[:1] == (5,))
    assert len(wide) == 2
    assert head_names(model) == wide


def test_a_plain_model_has_no_head_beyond_its_own():
    with torch.device("meta"):
        assert head_names(T.CLIPModel(clip_config())) == ()
        assert head_names(T.T5EncoderModel(T.T5Config(**{"num_layers": 1}))) == ()


# What a plain from_pretrained did not find


def test_a_new_pooler_under_a_plain_from_pretrained_is_trained_and_saved(tmp_path):
    saved(tmp_path, "bert", "AutoModelForMaskedLM")
    model = read("AutoModelForSequenceClassification", tmp_path, num_labels=3)
    assert new_names(model) == head_names(model) == BERT_POOLER + CLASSIFIER
    wanted, delta = trained(model)
    delta = sm.Delta.load(delta.save(tmp_path / "delta"))
    again = read("AutoModelForSequenceClassification", tmp_path, seed=7, num_labels=3)
    assert not torch.equal(again.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    with sm.attached(again, delta):
        assert torch.equal(h.logits(again), wanted)
    for found in (sm.merge(model, delta), sm.merge(again, delta), sm.attach(h.twin(again), delta)):
        torch.testing.assert_close(h.logits(found), wanted)


def test_a_new_pooler_under_a_pooling_is_not_compared(tmp_path):
    saved(tmp_path, "bert", "AutoModelForMaskedLM")
    wanted, delta = trained(read("AutoModelForSequenceClassification", tmp_path), pooling="mean")
    assert delta.head == CLASSIFIER
    again = read("AutoModelForSequenceClassification", tmp_path, seed=7)
    assert torch.equal(h.logits(sm.attach(again, delta)), wanted)


def test_a_new_output_layer_of_a_language_model_is_trained(tmp_path):
    saved(tmp_path, "llama", "AutoModel")
    model = read("AutoModelForCausalLM", tmp_path)
    assert head_names(model) == ("lm_head.weight",)
    wanted, delta = trained(model)
    with sm.attached(read("AutoModelForCausalLM", tmp_path, seed=7), delta) as again:
        assert torch.equal(h.logits(again), wanted)
    saved(tmp_path / "whole", "llama", "AutoModelForCausalLM")
    assert head_names(read("AutoModelForCausalLM", tmp_path / "whole")) == ()


def test_a_delta_says_what_its_head_is(tmp_path):
    saved(tmp_path, "roberta", "AutoModelForSequenceClassification")
    h.tokenizer().save_pretrained(tmp_path)
    model, plain = sm.load(tmp_path)[0], read("AutoModelForSequenceClassification", tmp_path)
    assert new_names(model) == new_names(plain) == ()
    assert head_names(model) == ("classifier.out_proj.weight", "classifier.out_proj.bias")
    assert len(head_names(plain)) == len(head_names(h.twin(plain))) == 4
    for one, other in ((model, plain), (plain, model)):
        wanted, delta = trained(one)
        for found in (other, h.twin(other)):
            assert torch.equal(h.logits(sm.attach(found, delta)), wanted)
            sm.detach(found)


def test_no_head_is_new_where_the_class_never_saves_it(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = T.MarianConfig(vocab_size=20, decoder_start_token_id=0, pad_token_id=0, **sizes, **heads)
    T.MarianMTModel(config).save_pretrained(tmp_path)
    model = read("MarianMTModel", tmp_path)
    assert new_names(model) == head_names(model) == ()


def test_a_mark_survives_attach_and_detach(tmp_path):
    saved(tmp_path, "bert", "AutoModelForMaskedLM")
    model = read("AutoModelForSequenceClassification", tmp_path)
    head = head_names(model)
    with h.untouched(model), sm.attached(model, "Full()"):
        assert head_names(model) == head
    assert head_names(model) == head


def test_a_new_tensor_below_the_blocks_lets_nothing_be_kept(tmp_path):
    saved(tmp_path, "bert", "AutoModelForSequenceClassification")
    model = read("AutoModelForSequenceClassification", tmp_path)
    top = resolve(model, "LN(layers='top:1')")
    assert (top.lowest, top.low) == ("bert.encoder.layer.1", ())
    model.bert.embeddings.token_type_embeddings = nn.Embedding(2, 16)
    plan = resolve(model, "LN(layers='top:1')")
    assert [site.path for site in plan.low] == ["bert.embeddings.token_type_embeddings"]
    assert plan.lowest == "embeddings"
    assert frozen_prefix(model, top)
    assert frozen_prefix(model, plan) == []


def test_a_new_pooler_that_nothing_reads_may_rest(tmp_path):
    saved(tmp_path, "bert", "AutoModelForMaskedLM")
    model = sm.attach(read("AutoModel", tmp_path), "LN()")
    before = {n: p.detach().clone() for n, p in trained_parameters(model).items()}
    assert set(before) > {"pooler.dense.weight", "pooler.dense.bias"}
    model(**h.ids()).last_hidden_state.square().sum().backward()
    check_gradients(model)
    sm.optimizer(model).step()
    assert still(model, before) == []


# Modules of one's own


class Tagger(nn.Module):
    """A transformer with a head beside it, as people write it."""

    def __init__(self, base, labels=3, seed=0):
        super().__init__()
        self.base = base
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.drop, self.classify = nn.Dropout(0.1), nn.Linear(16, labels)

    def forward(self, **inputs):
        hidden = self.base(**inputs).last_hidden_state
        return T.modeling_outputs.TokenClassifierOutput(logits=self.classify(self.drop(hidden)))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_what_stands_beside_a_transformer_is_its_head(kind, tmp_path):
    base = h.build(kind, "AutoModel")
    model = Tagger(base).eval()
    assert head_names(model) == ("classify.weight", "classify.bias")
    wanted, delta = trained(model)
    assert delta.head == ("classify.weight", "classify.bias")
    delta = sm.Delta.load(delta.save(tmp_path))
    again = Tagger(h.twin(base), seed=5).eval()
    assert torch.equal(h.logits(sm.attach(again, delta)), wanted)


def test_a_head_inside_a_module_of_ones_own_is_trained(tmp_path):
    class Around(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

    saved(tmp_path, "bert", "AutoModelForMaskedLM")
    new = tuple(f"model.{name}" for name in BERT_POOLER + CLASSIFIER)
    inner = read("AutoModelForSequenceClassification", tmp_path)
    assert head_names(Around(inner)) == new
    assert head_names(Around(h.twin(inner))) == new[2:]


# Nothing to train


@pytest.mark.parametrize(
    "build", [h.causal, lambda: h.build("bert", "AutoModel"), lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))]
)
def test_a_head_with_nothing_in_it_is_refused(build):
    model = build()
    name = type(model).__name__
    said = rf"Head\(\) trains nothing: no head is found in {name}; load a class with one.*Full\(target="
    with h.untouched(model), pytest.raises(PlanError, match=said):
        sm.attach(model, "Head()")


def test_a_class_for_labels_without_a_head_is_refused_unless_one_is_named():
    model = h.bert()
    model.classifier = nn.Identity()
    with pytest.raises(PlanError, match="BertForSequenceClassification is made for labels, but none of its layers"):
        sm.attach(model, "LN()")
    assert resolve(model, "LN() + Full(target='pooler')").head == ()


# Modules that the user names


def test_a_named_module_is_trained_beside_the_norms_counted_saved_and_merged(tmp_path):
    model = h.bert()
    plan = resolve(model, "LN() + Full(target='pooler')")
    assert plan.trained == resolve(model, "LN()").trained + 16 * 16 + 16
    assert {name for row in plan.entries if row.index == 1 for name, _ in row.names()} == set(BERT_POOLER)
    assert tuple(name for name, _ in plan.head) == CLASSIFIER
    wanted, delta = trained(model, "LN() + Full(target='pooler')")
    assert set(BERT_POOLER) < set(delta.tensors)
    assert delta.trained == plan.trained
    loaded = sm.Delta.load(delta.save(tmp_path))
    assert torch.equal(h.logits(sm.merge(model, loaded)), wanted)
    shake(model.bert.pooler.parameters(), 0.3)  # another process may have other values there
    assert torch.equal(h.logits(sm.attach(model, loaded)), wanted)
    sm.detach(model)
    shake(model.bert.encoder.layer[0].output.dense.parameters(), 0.3)
    with pytest.raises(DeltaError, match="same shapes but other values"):
        sm.attach(model, loaded)


def test_a_named_module_of_ones_own_model_loads_in_a_new_process():
    def build(seed):
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        torch.manual_seed(seed)
        return nn.Sequential(trunk, nn.Linear(4, 2))

    x, model = torch.ones(1, 4), build(1)
    sm.attach(model, "LN() + Full(target='1')")
    assert "1.weight" in trained_parameters(model)
    shake(trained_parameters(model).values(), 0.3)
    wanted, delta = model(x).detach(), sm.detach(model)
    assert torch.equal(sm.attach(build(2), delta)(x).detach(), wanted)


def test_names_are_runs_of_a_path():
    model = h.bert()

    def names(recipe):
        return {n for row in resolve(model, recipe).entries for n, _ in row.names()}

    assert names("Full(target='bert.pooler.dense.bias')") == {"bert.pooler.dense.bias"}
    assert names("Full(target=('pooler', 'position_embeddings'))") == {
        *BERT_POOLER,
        "bert.embeddings.position_embeddings.weight",
    }
    assert names("Full(target='query', layers='top:1')") == {
        f"bert.encoder.layer.1.attention.self.query.{term}" for term in ("weight", "bias")
    }
    assert len(names("Full(target='layer.1')")) == 16


def test_what_others_train_is_left_to_them():
    model = h.bert()
    for recipe, norms in (("LN() + Full(target='layer.1')", 0), ("Full(target='layer.1') + LN()", 1)):
        rows = resolve(model, recipe).entries
        trained = {row.index: set() for row in rows}
        for row in rows:
            trained[row.index] |= {name for name, _ in row.names()}
        assert len(trained[norms]) == 10
        assert len(trained[1 - norms]) == 12
        assert not trained[0] & trained[1]


@pytest.mark.parametrize(
    ("recipe", "kind", "said"),
    [
        ("Full(target='poler')", PlanError, "the model has no module or parameter 'poler'; did you mean 'pooler'?"),
        ("LN() + Full(target='classifier')", PlanError, "is left with nothing: the head or another term trains it"),
        ("LN() + Full(target='LayerNorm')", PlanError, "is left with nothing"),
        ("Full(target=3)", RecipeError, "target=3 must be a name or a tuple of names"),
        ("(LN() | Select('random', keep=9)) + Full(target='layer.1')", PlanError, "would be trained twice"),
    ],
)
def test_names_that_cannot_be(recipe, kind, said):
    model = h.bert()
    with h.untouched(model), pytest.raises(kind, match=said.replace("?", r"\?").replace("(", r"\(")):
        sm.attach(model, recipe)


def test_deltas_of_named_modules_do_not_add_up():
    model = h.bert()
    _, a = trained(model, "LN() + Full(target='pooler')")
    with pytest.raises(DeltaError, match="saves tensors whole, wherever they started"):
        (a + a).on(model)


def test_a_part_of_a_named_module_needs_the_rest_of_it():
    recipe = "LN() + (Full(target='pooler') | Select('random', keep=9))"
    model = h.bert()
    _, delta = trained(model, recipe)
    shake(model.bert.pooler.parameters(), 0.3)
    with pytest.raises(DeltaError, match="other values"):
        sm.attach(model, delta)


def test_a_file_from_before_there_was_a_target_is_read():
    assert Term.from_json({"name": "Full", "layers": None}) == sm.Full()


# Rows of added tokens


@pytest.mark.parametrize(
    ("kind", "cls"), [("bert", "AutoModelForSequenceClassification"), ("gpt2", "AutoModelForCausalLM")]
)
def test_rows_of_added_tokens_are_saved_or_refused(kind, cls, tmp_path):
    table = {"bert": "bert.embeddings.word_embeddings", "gpt2": "transformer.wte"}[kind]
    saved(tmp_path, kind, cls)
    wanted, recipe = None, f"LN() + Full(target='{table}')"
    for seed in (0, 5):
        model = read(cls, tmp_path)
        assert resized(model) == ()
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(h.WORDS) + 2, mean_resizing=False)
        assert resized(model) == (f"{table}.weight",)
        for refused in ("LN()", "Full()"):
            with pytest.raises(PlanError, match=rf"{table}\.weight has rows of tokens.*Full\(target='{table}'\)"):
                sm.attach(model, refused)
        if wanted is None:
            wanted, delta = trained(model, recipe)
        else:
            torch.testing.assert_close(h.logits(sm.attach(model, delta)), wanted, rtol=0, atol=0)
            sm.detach(model)
    model.save_pretrained(tmp_path / "resized")
    assert sm.attach(read(cls, tmp_path / "resized"), "LN()") is not None


def test_rows_added_to_a_model_from_load_are_seen(tmp_path):
    saved(tmp_path, "bert", "AutoModelForMaskedLM")
    h.tokenizer().save_pretrained(tmp_path)
    model, _ = sm.load(tmp_path)
    assert resized(model) == ()
    model.config._name_or_path = ""
    model.resize_token_embeddings(len(h.WORDS) + 2, mean_resizing=False)
    assert resized(model) == ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias")
    with pytest.raises(
        PlanError, match=r"Full\(target=\('bert.embeddings.word_embeddings', 'cls.predictions.bias'\)\)"
    ):
        sm.attach(model, "LN()")


def test_the_fingerprint_leaves_out_what_is_new_and_nothing_else(tmp_path):
    saved(tmp_path, "bert", "AutoModelForMaskedLM")
    a, b = (read("AutoModel", tmp_path, seed=seed) for seed in (0, 5))
    assert Fingerprint.of(a, ()) == Fingerprint.of(b, ())
    assert Fingerprint.of(copy.deepcopy(a), ()) != Fingerprint.of(copy.deepcopy(b), ())
