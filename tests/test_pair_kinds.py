"""Pairs and retrieval: losses and metrics against formulas, what is refused, and that training learns."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import transformers as T

import smidgen as sm
from smidgen.cli.commands import main
from smidgen.common.errors import DataError, SmidgenError, TrainError
from smidgen.data.kinds.base import kind_named
from smidgen.data.ranking import RankedPair, mrr, recall_at_1, recall_at_10
from smidgen.importance.fisher_information import attached_fisher
from smidgen.training.run.batch_coupling import check_coupling
from smidgen.training.run.settings import Settings
from tests import helpers as h

GOOD, BAD = h.KINDS["pos"], h.KINDS["neg"]


def encoder(seed=0):
    return h.build("bert", "AutoModel", seed=seed, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def scored(count, start=0):
    """Two sentences; 4 if both praise or both blame, else 1."""
    rows = []
    for i in range(start, start + count):
        words = [(GOOD, BAD)[k][(i + k) % 3] for k in (i % 2, i // 2 % 2)]
        texts = [f"the film was {word} {h.WORDS[10 + (i + k) % 10]}" for k, word in enumerate(words)]
        rows.append({"sentence1": texts[0], "sentence2": texts[1], "score": 4.0 if i % 2 == i // 2 % 2 else 1.0})
    return rows


def asked(count, start=0):
    """A question whose answer has one of its words; all answers of a batch of 8 differ."""
    words = [*GOOD, *BAD, "film", "plot"]
    fill = h.WORDS[12:]
    made = []
    for i in range(start, start + count):
        word = words[i % 8]
        made.append({"question": f"{word} {fill[i % 7]} it", "answer": f"{fill[(i // 8) % 7]} {word} the"})
    return made


@pytest.fixture
def similar(tmp_path):
    return h.task(tmp_path / "scored", make=scored, kind="pairs")


@pytest.fixture
def found(tmp_path):
    return h.task(tmp_path / "asked", make=asked, kind="retrieval")


def batch_of(task, count=4, split="train"):
    return task.collator(h.tokenizer())(list(task.encode(h.tokenizer(), split))[:count])


def vectors(model, texts):
    """Mean last hidden state of each text alone, of length 1."""
    made = []
    for text in texts:
        with torch.no_grad():
            states = model(**h.tokenizer()(text, return_tensors="pt")).last_hidden_state[0]
        made.append(states.mean(0) / states.mean(0).norm())
    return torch.stack(made)


def test_columns_and_scale(similar, found):
    assert (similar.kind, similar.text, similar.label, similar.metric) == (
        "pairs", ("sentence1", "sentence2"), "score", "spearman",
    )  # fmt: skip
    assert set(similar.splits["train"]["score"][:]) == {0.0, 1.0}
    assert "from 1 to 4, learned as cosines from 0 to 1" in similar.notes["column 'score'"]
    assert (found.text, found.label, found.metric) == (("question", "answer"), None, "mrr")


def test_the_cosine_and_the_squared_error_are_the_formulas(similar):
    model, batch = encoder(), batch_of(similar)
    rows = similar.splits["train"][:4]
    u, v = vectors(model, rows["sentence1"]), vectors(model, rows["sentence2"])
    outputs = similar.task_kind.forward(model, batch)
    torch.testing.assert_close(outputs.logits[:, 0], (u * v).sum(1))
    torch.testing.assert_close(outputs.loss, (((u * v).sum(1) - torch.tensor(rows["score"])) ** 2).mean().float())


def contrast(u, v, wrong=None, right=None):
    """InfoNCE in a loop. wrong: candidates of each row; right: rows that ask."""
    losses = []
    for i in range(len(u)) if right is None else right:
        some = [j for j in range(len(v)) if j == i or wrong is None or j in wrong[i]]
        scores = torch.stack([u[i] @ v[j] for j in some]) / 0.05
        losses.append(scores.logsumexp(0) - u[i] @ v[i] / 0.05)
    return torch.stack(losses).mean()


def test_info_nce_is_the_formula(found):
    model, rows = encoder(), found.splits["train"][:4]
    wanted = contrast(vectors(model, rows["question"]), vectors(model, rows["answer"]))
    loss = found.task_kind.forward(model, batch_of(found)).loss
    torch.testing.assert_close(loss, wanted)
    assert not torch.isclose(loss, contrast(vectors(model, rows["question"]), vectors(model, rows["answer"]).flip(0)))


def test_equal_texts_are_no_wrong_answers(tmp_path):
    def make(count, start=0):
        rows = asked(count, start)
        rows[1]["answer"] = rows[0]["answer"]
        rows[3]["question"] = rows[2]["question"]
        return rows

    task, model = h.task(tmp_path, make=make, kind="retrieval"), encoder()
    rows = task.splits["train"][:4]
    u, v = vectors(model, rows["question"]), vectors(model, rows["answer"])
    loss = task.task_kind.forward(model, batch_of(task)).loss
    torch.testing.assert_close(loss, contrast(u, v, {0: {2, 3}, 1: {2, 3}, 2: {0, 1}, 3: {0, 1}}))
    assert not torch.isclose(loss, contrast(u, v))


def test_wrong_pairs_ask_nothing_but_stand_in_the_sums(tmp_path):
    def make(count, start=0):
        return [{**row, "label": int(i % 2 == 0)} for i, row in enumerate(asked(count, start))]

    task, model = h.task(tmp_path, make=make, kind="retrieval"), encoder()
    assert task.label == "label"
    rows = task.splits["train"][:4]
    u, v = vectors(model, rows["question"]), vectors(model, rows["answer"])
    torch.testing.assert_close(task.task_kind.forward(model, batch_of(task)).loss, contrast(u, v, right=[0, 2]))


def test_other_labels_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"train row 0: label 4\.0 is neither 1 \(a right pair\) nor 0"):
        h.task(tmp_path, make=scored, kind="retrieval", label="score")
    same = [{**row, "score": 2.0} for row in scored(20)]
    with pytest.raises(DataError, match="must hold numbers that say how alike the texts are, not all the same"):
        sm.Task.load(h.jsonl(tmp_path / "same.jsonl", same), kind="pairs")
    with pytest.raises(DataError, match="pairs compares two text columns, found 1: sentence1"):
        sm.Task.load(h.jsonl(tmp_path / "one.jsonl", scored(20)), kind="pairs", text="sentence1")


def plane(*angles):
    return [np.array([math.cos(a), math.sin(a)], np.float32) for a in angles]


def test_ranks_by_hand():
    first, second = plane(0, 1, 2, 3), plane(0.05, 1.6, 1.9, 2.6)
    pairs = [RankedPair(u, v, i, 10 + i) for i, (u, v) in enumerate(zip(first, second, strict=True))]
    assert mrr(pairs, [1] * 4) == recall_at_1(pairs, [1] * 4) == 1.0
    turned = [RankedPair(u, v, i, 10 + i) for i, (u, v) in enumerate(zip(first, second[::-1], strict=True))]
    ranks = [4, 2, 2, 4]  # by the distance of angles to 2.6, 1.9, 1.6, 0.05
    assert mrr(turned, [1] * 4) == pytest.approx(np.mean([1 / r for r in ranks]))
    assert recall_at_1(turned, [1] * 4) == 0.0
    assert recall_at_10(turned, [1] * 4) == 1.0


def test_a_text_with_two_right_ones_and_equal_texts_counted_once():
    u, (near, far, wrong) = plane(0)[0], plane(0.1, 0.5, 0.3)
    pairs = [RankedPair(u, near, 0, 1), RankedPair(u, far, 0, 2), RankedPair(plane(0.3)[0], wrong, 5, 3)]
    assert recall_at_1(pairs, [1, 1, 0]) == 0.5
    assert mrr(pairs, [1, 1, 0]) == 1.0
    assert mrr([*pairs, RankedPair(u, near, 0, 1)], [1, 1, 0, 1]) == 1.0
    assert mrr(pairs, [0, 1, 0]) == pytest.approx(1 / 3)
    assert math.isnan(mrr(pairs, [0, 0, 0]))
    assert math.isnan(recall_at_1(pairs, [0, 0, 0]))
    equal = [RankedPair(u, near, 0, 1), RankedPair(u, near, 1, 2)]  # equally near: the wrong one first
    assert recall_at_1(equal, [1, 0]) == 0.0


def test_keys_do_not_depend_on_padding(found):
    rows = list(found.encode(h.tokenizer(), "train"))[:3]
    wide = found.task_kind.collator(h.tokenizer(), 16)(rows)
    narrow = found.task_kind.collator(h.tokenizer())(rows)
    model = encoder()
    keys = [found.task_kind.forward(model, batch).keys for batch in (wide, narrow)]
    assert torch.equal(*keys)
    assert len(keys[0].unique()) == 6


OPTIONS = {"tokenizer": h.tokenizer(), "progress": False, "batch_size": 8}


@pytest.mark.parametrize("recipe", ["LN()", "LoRA(rank=2)"])
def test_training_brings_alike_texts_together(similar, recipe, tmp_path):
    model = encoder()
    before = sm.evaluate(model, similar, tokenizer=h.tokenizer()).value
    with h.untouched(model):
        delta = sm.fit(model, recipe, similar, out=tmp_path / "run", epochs=6, lr=0.02, **OPTIONS)
    after = sm.evaluate(model, similar, delta=sm.Delta.load(tmp_path / "run"), tokenizer=h.tokenizer())
    assert after.value > max(before, 0.8)
    assert list(after.values) == ["spearman", "pearson"]
    (row,) = sm.predict(
        model, ["the film was good"], pairs=["the film was great"], delta=delta, tokenizer=h.tokenizer()
    )
    assert 0.5 < row.answer <= 1.0 + 1e-5


def test_training_finds_answers(found, tmp_path):
    model = encoder()
    before = sm.evaluate(model, found, tokenizer=h.tokenizer()).value
    delta = sm.fit(model, "LN() + LoRA(rank=2)", found, out=tmp_path / "run", epochs=8, lr=0.01, **OPTIONS)
    after = sm.evaluate(model, found, delta=delta, tokenizer=h.tokenizer())
    assert after.value > before + 0.1
    chosen = json.loads((tmp_path / "run" / "run.json").read_text())["chosen"]
    assert chosen["cache"] == chosen["rows"] == "a pair is two texts, and states are kept of one"


def test_a_pairs_gradient_is_cut_and_a_retrievals_refused(similar, found):
    whole = sm.fit(encoder(), "LN()", similar, epochs=1, **OPTIONS)
    cut = sm.fit(encoder(), "LN()", similar, epochs=1, max_memory="400KB", **OPTIONS)
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(cut.tensors[name], tensor, rtol=1e-4, atol=1e-6)
    coupled = "the loss of a retrieval task is coupled over its batch"
    with pytest.raises(TrainError, match=f"max_memory=1000000 cuts batches, and {coupled}; set a smaller batch_size"):
        sm.fit(encoder(), "LN()", found, max_memory="1MB", **OPTIONS)
    with pytest.raises(TrainError, match=f"batch_size=1, and {coupled}; it must be at least 2"):
        sm.fit(encoder(), "LN()", found, **OPTIONS | {"batch_size": 1})
    with pytest.raises(TrainError, match=f"2 processes part each batch, and {coupled}; use one process"):
        check_coupling(kind_named("retrieval"), Settings(), 2)
    check_coupling(kind_named("pairs"), Settings(max_memory=10), 2)


def test_what_a_pair_cannot_have_is_refused_in_a_line(similar, found):
    with pytest.raises(
        TrainError, match="cache=True, but a pair is two texts, and states are kept of one; leave it out"
    ):
        sm.fit(encoder(), "LN()", similar, cache=True, **OPTIONS)
    with pytest.raises(TrainError, match="batching='pack' is for causal-lm and chat, not pairs"):
        sm.fit(encoder(), "LN()", similar, batching="pack", **OPTIONS)
    with pytest.raises(
        DataError, match="needs the probability of an example's labels, and the loss of a retrieval task"
    ):
        sm.fisher(encoder(), found, tokenizer=h.tokenizer())
    with pytest.raises(SmidgenError, match="StayClose compares distributions"):
        sm.fit(encoder(), "LN()", found, objective=sm.StayClose(), **OPTIONS)


@pytest.mark.parametrize("kind", ["empirical", "true", "expected"])
def test_fisher_of_pairs_is_that_of_one_example_at_a_time(similar, kind):
    model = encoder().double()
    with sm.attached(model, "LN() + LoRA(rank=2)"):
        many, one = (
            attached_fisher(model, similar, 6, kind, tokenizer=h.tokenizer(), batch_size=size) for size in (4, 1)
        )
        assert not many.looped
    for name, value in many.items():
        torch.testing.assert_close(value, one[name], rtol=1e-4, atol=1e-12)
    assert float(sum(value.sum() for value in many.values())) > 0


def test_select_and_search(similar, found):
    delta = sm.fit(encoder(), "LN() | Select('fisher', keep=0.25)", similar, epochs=1, **OPTIONS)
    assert delta.trained == 40
    delta = sm.fit(encoder(), "LN() | Select('change', keep=0.25, warmup=4)", found, epochs=1, **OPTIONS)
    assert delta.trained == 40
    result = sm.search(encoder(), "LN()", similar, lr=[0.01], epochs=1, **OPTIONS)
    assert result.trials[0].error is None


def test_the_commands(tmp_path, capsys):
    h.jsonl(tmp_path / "data" / "train.jsonl", scored(32))
    h.jsonl(tmp_path / "data" / "validation.jsonl", scored(12, 100))
    model = str(tmp_path / "bert")
    encoder().save_pretrained(model)
    h.tokenizer().save_pretrained(model)
    data, out = str(tmp_path / "data"), str(tmp_path / "run")

    def run(*line):
        assert main([*line, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    about = ("--data", data, "--kind", "pairs")
    assert "validation spearman" in run("tune", "--model", model, "--out", out, "--epochs", "1", *about)["scores"]
    assert run("evaluate", "--delta", out, "--split", "validation", *about)["metric"] == "spearman"
    texts = ("--text", "the film was good", "--pair", "the plot was bad")
    assert -1 <= run("predict", "--delta", out, *texts)["predictions"][0]["answer"] <= 1
    assert T.AutoModel.from_pretrained(model).config.model_type == "bert"
