"""fisher: every kind on every kind of task, at the base and at a delta; the model untouched; what is wrong is said."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call

import smidgen as sm
from smidgen.common.errors import AttachError, DataError, DeltaError, PlanError
from smidgen.delta.merging import folded
from smidgen.importance import gradient_recorder as record
from smidgen.importance import per_example_rules as rules
from smidgen.importance.fisher_information import attached_fisher, attached_mean_gradients, fisher, mean_gradients
from smidgen.importance.likelihood import Likelihood
from smidgen.importance.sample import Sample
from smidgen.ports.attachment_record import trained_parameters
from smidgen.testing.cases import shake
from tests import helpers as h
from tests.test_fisher_rules import agree, one_by_one, score, text_model, texts


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return h.task(tmp_path_factory.mktemp("films"), train=20)


def of(model, task, *args, **options):
    return fisher(model, task, *args, tokenizer=h.tokenizer(), **options)


def whole(task, count=20, seed=0):
    return Sample.of_task(task, h.tokenizer(), "train", count, seed)


# The public function


def test_all_norms_of_a_task_and_the_model_untouched(task):
    model = h.bert()
    with h.untouched(model):
        found = of(model, task)
    assert all("LayerNorm" in name for name in found)
    assert len(found) == 10
    assert (found.examples, found.kind, found.split, found.looped) == (20, "empirical", "train", ())
    assert {(v.dtype, v.device.type, v.requires_grad) for v in found.values()} == {(torch.float32, "cpu", False)}
    sm.attach(model, "LN()")
    agree(found, one_by_one(model, whole(task)), 1e-5)


@pytest.mark.parametrize("recipe", ["LN(layers='top:1')", "Full()", "BitFit() + LoRA(rank=2)"])
def test_names_and_shapes_are_those_of_the_recipe(recipe, task):
    model = h.bert().train()  # no dropout: the mode does not matter
    model.bert.pooler.dense.weight.requires_grad_(False)
    with h.untouched(model):
        found = of(model, task, recipe, examples=3)
    sm.attach(model, recipe)
    names = {n: p.shape for n, p in trained_parameters(model).items() if not n.startswith("classifier")}
    assert {name: value.shape for name, value in found.items()} == names
    assert list(found) == list(names)


def test_the_choice_of_examples_is_seeded_and_batches_do_not_matter(task):
    model = text_model("bert")
    one, two = (of(model, task, examples=6, seed=1, batch_size=size) for size in (2, 5))
    agree(one, two, 1e-12)
    assert one.examples == 6
    with pytest.raises(AssertionError):
        agree(one, of(model, task, examples=6, seed=2), 0.01)
    sm.attach(model, "LN()")
    agree(one, one_by_one(model, whole(task, 6, 1)))


def test_pooling_is_the_recipes(task):
    model = text_model("bert")
    found = of(model, task, pooling="mean")
    sm.attach(model, "LN()", pooling="mean")
    agree(found, one_by_one(model, whole(task)))


def test_after_a_warm_up_on_what_is_attached(task):
    model = sm.attach(text_model("bert"), "LN()")
    shake(trained_parameters(model).values(), 0.3)
    with h.untouched(model):
        found = attached_fisher(model, task, tokenizer=h.tokenizer())
    agree(found, one_by_one(model, whole(task)))
    with pytest.raises(AttachError, match="attached_fisher"):
        of(model, task)


@pytest.mark.parametrize("recipe", ["DoRA(rank=2) + BitFit()", "SSF() + DoRA(rank=2)", "IA3() + DoRA(rank=2) + Full()"])
def test_beside_a_method_that_reads_the_weight(recipe, task):
    """Against autograd through the merged weights of a plain model, one example at a time."""
    model = sm.attach(text_model("bert"), recipe)
    shake(trained_parameters(model).values(), 0.3)
    sample = whole(task, 4)
    found = attached_fisher(model, sample)
    plain = copy.deepcopy(model)
    sm.detach(plain)
    tensors = {name: p for name, p in trained_parameters(model).items() if name in found}
    wanted = dict.fromkeys(tensors, 0)
    for place in range(len(sample)):
        inputs, labels = sample.batch([place], torch.device("cpu"))
        logits = functional_call(plain, folded(model), kwargs=inputs).logits
        grads = torch.autograd.grad(score(sample.kind, logits, labels), list(tensors.values()))
        wanted = {name: wanted[name] + g.square() / len(sample) for name, g in zip(tensors, grads, strict=True)}
    agree(found, wanted)


def test_mean_gradients(task):
    model = text_model("bert")
    with h.untouched(model):
        mean = mean_gradients(model, task, "LN()", tokenizer=h.tokenizer(), examples=9, seed=3)
    assert mean.examples == 9
    sm.attach(model, "LN()")
    agree(mean, attached_mean_gradients(model, whole(task, 9, 3), batch_size=1))
    assert any(bool((value < 0).any()) for value in mean.values())


# Kinds of information, kinds of task


def spread_out(kind, logits, labels):
    """Terms of the expected information: every class with its probability; a normal's closed form."""
    if kind == "regression":
        return [(1 / 0.25, logits[0, 0])]
    probabilities = logits.softmax(-1)[0].tolist()
    return [(p, logits.log_softmax(-1)[0, c]) for c, p in enumerate(probabilities)]


@pytest.mark.parametrize("kind", ["classification", "regression", "tokens", "causal-lm"])
def test_empirical_is_the_labels(kind):
    model, sample = head(kind), texts(kind)
    sm.attach(model, "LN()")
    agree(attached_fisher(model, sample, batch_size=3), one_by_one(model, sample))


def head(kind):
    cls = {"tokens": "TokenClassification", "causal-lm": "CausalLM"}.get(kind, "SequenceClassification")
    base = "llama" if kind == "causal-lm" else "bert"
    return h.build(base, f"AutoModelFor{cls}", **({"num_labels": 1} if kind == "regression" else {})).double()


@pytest.mark.parametrize(("kind", "labels"), [("classification", 2), ("classification", 3), ("regression", 1)])
def test_expected_is_the_sum_over_classes(kind, labels):
    model, sample = h.build("bert", num_labels=labels).double(), texts(kind)
    sm.attach(model, "LN() + LoRA(rank=2)")
    found = attached_fisher(model, sample, kind="expected", sigma=0.5, batch_size=3)
    agree(found, one_by_one(model, sample, spread_out))
    with pytest.raises(AssertionError):
        agree(found, attached_fisher(model, sample), 0.01)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_true_comes_near_expected_with_many_draws(kind):
    model, sample = head(kind), texts(kind)
    sm.attach(model, "LN(layers='top:1')")
    expected = attached_fisher(model, sample, kind="expected", sigma=0.5)
    many = attached_fisher(model, sample, kind="true", samples=400, sigma=0.5)
    agree(many, dict(expected), 0.15)
    with pytest.raises(AssertionError):
        agree(attached_fisher(model, sample, kind="true", sigma=0.5), dict(expected), 0.15)


@pytest.mark.parametrize("kind", ["classification", "regression", "tokens", "causal-lm"])
def test_true_is_seeded_and_knows_no_batches(kind):
    model, sample = head(kind), texts(kind)
    sm.attach(model, "LN()")
    one = attached_fisher(model, sample, kind="true", seed=1, samples=2, batch_size=2)
    agree(attached_fisher(model, sample, kind="true", seed=1, samples=2, batch_size=7), one, 1e-12)
    with pytest.raises(AssertionError):
        agree(attached_fisher(model, sample, kind="true", seed=2, samples=2), one, 0.01)
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    attached_fisher(model, sample, kind="true")
    assert torch.rand(1) == before


def test_draws_follow_the_model():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    drawn = Likelihood("classification", "true", 4000)._draw(logits.log_softmax(-1)[:, None], [3, 4])
    for row in range(2):
        counts = torch.bincount(torch.stack(drawn)[:, row, 0], minlength=3) / 4000
        assert (counts - logits[row].softmax(-1)).abs().max() < 0.03
    fair = torch.zeros(200, 1, 2, dtype=torch.float64).log_softmax(-1)
    (alike,) = Likelihood("classification", "true")._draw(fair, range(200))
    assert 70 < alike.sum() < 130  # each example has draws of its own


def test_true_takes_a_draw_for_each_labelled_position():
    """The same draws, put in as labels, give the empirical information; unlabelled positions stay out."""
    model, sample = head("tokens"), texts("tokens")
    sm.attach(model, "LN()")
    relabelled = []
    for place, example in enumerate(sample.examples):
        inputs, labels = sample.batch([place], torch.device("cpu"))
        logp = model(**inputs).logits.detach().log_softmax(-1)
        (drawn,) = Likelihood("tokens", "true", 1, seed=7)._draw(logp, [sample.numbers[place]])
        relabelled.append({**example, "labels": torch.where(labels == -100, labels, drawn)[0].tolist()})
    other = Sample("tokens", relabelled, sample.collate, sample.numbers)
    agree(attached_fisher(model, sample, kind="true", seed=7), attached_fisher(model, other))


def test_regression_takes_the_residual_over_the_variance():
    model, sample = head("regression"), texts("regression")
    sm.attach(model, "LN()")
    terms = lambda kind, logits, labels: [(0.5**-4, score(kind, logits, labels))]  # noqa: E731
    agree(attached_fisher(model, sample, sigma=0.5), one_by_one(model, sample, terms))


def test_a_causal_task_counts_its_blocks(tmp_path):
    text = "the film was good and the plot was bad \n\n" * 30
    (tmp_path / "text.txt").write_text(text)
    task = sm.Task.load(tmp_path / "text.txt", kind="causal-lm")
    model = head("causal-lm")
    found = of(model, task, examples=4, max_length=9)
    assert found.examples == 4
    sample = Sample.of_task(task, h.tokenizer(), "train", 4, 0, 9)
    sm.attach(model, "LN()")
    agree(found, one_by_one(model, sample))


# At a delta


def trained(model, recipe, pooling=None):
    sm.attach(model, recipe, pooling=pooling)
    shake(trained_parameters(model).values(), 0.3)
    return sm.detach(model)


@pytest.mark.parametrize("pooling", [None, "mean"])
@pytest.mark.parametrize("recipe", ["LN()", "LoRA(rank=2)", "Head()", "BitFit() + IA3()"])
def test_at_a_delta_of_its_own_recipe(recipe, pooling, task):
    model = text_model("bert")
    delta = trained(model, recipe, pooling)
    with h.untouched(model):
        found = of(model, task, delta=delta)
    assert set(found) == set(of(model, task, "LN()" if recipe == "Head()" else recipe, examples=1, pooling=pooling))
    sm.attach(model, delta) if recipe != "Head()" else sm.attach(model, "LN()", pooling=pooling)
    for name, tensor in delta.tensors.items():
        trained_parameters(model)[name].data.copy_(tensor)
    agree(found, one_by_one(model, whole(task)))


@pytest.mark.parametrize("pooling", [None, "mean"])
@pytest.mark.parametrize(("recipe", "asked"), [("LoRA(rank=2)", "LN()"), ("LN()", "Full(layers='top:1')"),
                                               ("BitFit()", "LN(terms='gain')")])  # fmt: skip
def test_at_a_delta_of_another_recipe(recipe, asked, pooling, task):
    """The delta is folded in, head and all; the norm's gradient is what it is with the delta attached."""
    model = text_model("bert")
    delta = trained(model, recipe, pooling)
    with h.untouched(model):
        found = of(model, task, asked, delta=delta)
    sm.attach(model, asked, pooling=pooling)
    names = set(found)
    sm.detach(model)
    sm.attach(model, delta)
    agree(found, _by_name(model, names, whole(task)))


def _by_name(model, names, sample):
    """The oracle over existing parameters of a model with a delta attached."""
    parameters = {name: p for name, p in model.named_parameters() if name in names}
    totals = dict.fromkeys(parameters, 0)
    for p in parameters.values():
        p.requires_grad_(True)
    for place in range(len(sample)):
        inputs, labels = sample.batch([place], torch.device("cpu"))
        term = score(sample.kind, model(**inputs).logits, labels)
        for name, grad in zip(totals, torch.autograd.grad(term, list(parameters.values())), strict=True):
            totals[name] = totals[name] + grad.square() / len(sample)
    return {name: total.detach() for name, total in totals.items()}


def test_a_delta_with_other_scaling_is_folded_not_copied(task):
    model = text_model("bert")
    delta = trained(model, "LoRA(rank=2, alpha=8)")
    found = of(model, task, "LoRA(rank=2, alpha=1)", delta=delta)
    assert not any(value.any() for name, value in found.items() if name.endswith("A"))  # a fresh pair on top
    assert any(value.any() for name, value in of(model, task, delta=delta).items() if name.endswith("A"))


def test_a_narrowed_recipe_is_scored_whole(task):
    found = of(h.bert(), task, "LN() | Select('random', keep=0.1)", examples=2)
    assert {name: v.shape for name, v in found.items()} == {n: v.shape for n, v in of(h.bert(), task).items()}


# What is wrong


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "empiricle"}, DataError, "kind='empiricle' is not one of .*did you mean 'empirical'"),
        ({"examples": 0}, DataError, "examples=0 must be a whole number of at least 1"),
        ({"examples": 2.5}, DataError, "examples=2.5 must be"),
        ({"samples": 0, "kind": "true"}, DataError, "samples=0 must be"),
        ({"sigma": 0.0}, DataError, "sigma=0.0 must be above 0"),
        ({"sigma": math.nan}, DataError, "sigma=nan must be above 0"),
        ({"batch_size": 0}, DataError, "batch_size=0 must be"),
        ({"chunk_bytes": 0}, DataError, "chunk_bytes=0 must be"),
        ({"split": "trian"}, DataError, "no trian split; there are .*did you mean 'train'"),
        ({"recipe": "Head()"}, PlanError, r"Head\(\) trains nothing but the head"),
        ({"recipe": "LoRA(target='qeury')"}, PlanError, "did you mean 'query'"),
    ],
)
def test_bad_options_are_named(options, error, message, task):
    model = h.bert()
    with h.untouched(model), pytest.raises(error, match=message) as raised:
        of(model, task, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["tokens", "causal-lm"])
def test_what_cannot_be_summed_is_refused(kind):
    model = sm.attach(head(kind), "LN()")
    with pytest.raises(DataError, match="kind='expected' would sum over all .*use kind='true'"):
        attached_fisher(model, texts(kind), kind="expected")


def test_active_dropout_is_refused(task):
    model = h.bert(dropout=0.1).train()
    with h.untouched(model), pytest.raises(DataError, match=r"training mode with dropout active; call model.eval\(\)"):
        of(model, task)
    of(model.eval(), task, examples=2)
    llama = h.build("llama", attention_dropout=0.1).train()
    with pytest.raises(DataError, match="self_attn.*dropout active"):
        of(llama, task)
    edited = sm.attach(h.bert(), "LoRA(dropout=0.5)").train()
    with pytest.raises(DataError, match="dropout active"):
        attached_fisher(edited, texts())


def test_labels_must_fit_the_head(task):
    with pytest.raises(DataError, match=r"the model's head gives 3 values, the task has 2 labels; load the model with"):
        of(h.bert(num_labels=3), task)
    model = sm.attach(h.bert(), "LN()")
    with pytest.raises(DataError, match="example 102 of train has the label 2; the model's head knows 0 to 1"):
        attached_fisher(model, texts(labels=3))
    with pytest.raises(DataError, match="a tokens task does not fit logits"):
        attached_fisher(model, texts("tokens"))
    with pytest.raises(DataError, match="BertModel gives no logits"):
        attached_fisher(sm.attach(h.build("bert", "AutoModel"), "LN()"), texts())


@pytest.mark.parametrize("size", [1, 4])
def test_a_log_probability_that_is_not_finite_names_the_example(size):
    model, sample = h.bert(), texts(count=6)
    sample.examples[4]["input_ids"][1] = 19
    assert sum(19 in example["input_ids"] for example in sample.examples) >= 1
    model.bert.embeddings.word_embeddings.weight.data[19] = math.nan
    first = [place for places in sample.batches(9) for place in places if 19 in sample.examples[place]["input_ids"]]
    sm.attach(model, "LN()")
    with pytest.raises(DataError, match=r"example 10\d of train has a log-probability of nan") as raised:
        attached_fisher(model, sample, batch_size=size)
    assert int(str(raised.value).split()[1]) - 100 in first


class Broken(torch.autograd.Function):
    """Passes values on, and inf back for one example, told by its length."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.new_full(g.shape, math.inf) if g.shape[1] == 9 else g


def test_a_gradient_that_is_not_finite_names_tensor_and_example():
    model, sample = h.bert(), texts(count=7)
    (long,) = [i for i, e in enumerate(sample.examples) if len(e["input_ids"]) == 9]
    model.bert.embeddings.LayerNorm.register_forward_hook(lambda m, a, out: Broken.apply(out))
    sm.attach(model, "LN()")
    with h.untouched(model):
        wanted = rf"the gradient of bert.embeddings.LayerNorm\.\w+ is not finite at example {100 + long} of train"
        with pytest.raises(DataError, match=wanted):
            attached_fisher(model, sample, batch_size=1)


def test_another_base_or_pooling_is_refused(task):
    delta = trained(h.bert(), "LN()")
    with pytest.raises(DeltaError, match="other values"):
        of(h.bert(seed=3), task, delta=delta)
    with pytest.raises(DeltaError, match="other values"):
        of(h.bert(seed=3), task, "Full()", delta=trained(h.bert(), "LoRA()"))
    with pytest.raises(DataError, match="pooling='mean', but the delta was trained with None"):
        of(h.bert(), task, delta=delta, pooling="mean")


def test_a_deltas_labels_and_length_count(task):
    model = h.bert()
    delta = replace(trained(model, "LN()"), labels=("no", "yes"))
    with pytest.raises(DataError, match="the data has the labels neg, pos; the delta was trained on no, yes"):
        of(model, task, delta=delta)
    short = replace(delta, labels=("neg", "pos"), info={"settings": {"max_length": 5}})
    agree(of(model, task, delta=short), of(model, task, delta=replace(short, info={}), max_length=5), 1e-6)
    with pytest.raises(AssertionError):
        agree(of(model, task, delta=short), of(model, task, delta=short, max_length=9), 0.01)


def test_running_statistics_are_refused():
    model = sm.attach(nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4)), "LN()")
    sample = Sample.of_batch({"input": torch.randn(3, 4), "labels": torch.zeros(3, dtype=torch.long)}, "classification")
    with pytest.raises(DataError, match=r"1 \(BatchNorm1d\) is in training mode with running statistics"):
        attached_fisher(model, sample)


def test_nothing_is_left_behind_by_an_error_on_the_way(monkeypatch, task):
    def fails(*_):
        raise KeyboardInterrupt

    model = sm.attach(h.bert(), "LN() + LoRA() + IA3()")
    monkeypatch.setitem(rules.RULES, "norm", fails)
    monkeypatch.setattr(record.Recorder, "settle", fails)
    with h.untouched(model), pytest.raises(KeyboardInterrupt):
        attached_fisher(model, task, tokenizer=h.tokenizer())
