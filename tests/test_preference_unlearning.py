"""DPO and gradient difference: their formulas in plain loops, and what training by them does."""

from types import SimpleNamespace

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import SmidgenError, TrainError
from smidgen.data.kinds.base import kind_named
from smidgen.steps.loss_computation import At, Beside, loss_of
from smidgen.steps.other_batches import OtherBatches, Source
from smidgen.steps.step import Batches, Step
from tests import helpers as h

QUICK = {"epochs": 2, "batch_size": 4, "progress": False, "max_length": 16, "lr": 1e-2}
WORDS = ("good", "bad")


def answers(folder, word, count=16):
    """Prompts that are all answered by one word."""

    def made(n, start=0):
        return [
            {"prompt": f"the film {h.WORDS[10 + i % 10]} was", "completion": f" {word}"}
            for i in range(start, start + n)
        ]

    return h.task(folder, count, 4, made, kind="causal-lm")


@pytest.fixture
def pair(tmp_path):
    words = [w for kind in h.KINDS.values() for w in kind][:2]
    return [answers(tmp_path / word, word) for word in words]


def log_p(logits, labels):
    """Log-probability of a row's labels, token by token, each from the position before."""
    total = 0.0
    for place, label in enumerate(labels.tolist()):
        if label != -100 and place > 0:
            odds = logits[place - 1].double()
            total += float(odds[label] - odds.exp().sum().log())
    return total


def test_dpo_is_equation_7(pair):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (2, 3, 6), generator=generator)
    labels[0, 0, :3], labels[1, 2, 4:] = -100, -100
    logits = {key: torch.randn(3, 6, 5, generator=generator) for key in ("w", "l", "ref w", "ref l")}
    made = {
        (None, "train"): logits["w"], (None, "rejected"): logits["l"],
        ("reference", "train"): logits["ref w"], ("reference", "rejected"): logits["ref l"],
    }  # fmt: skip
    prompt = {"input_ids": torch.zeros(3, 6, dtype=torch.long), "attention_mask": torch.zeros(3, 6)}
    batches = {"train": {**prompt, "labels": labels[0]}, "rejected": {**prompt, "labels": labels[1]}}
    step = Step(torch.nn.Module(), kind_named("causal-lm"), batches, lambda *which: SimpleNamespace(logits=made[which]))
    found = float(sm.DPO(pair[1], beta=0.3).loss(step))
    total = 0.0
    for row in range(3):
        w = log_p(logits["w"][row], labels[0][row]) - log_p(logits["ref w"][row], labels[0][row])
        lost = log_p(logits["l"][row], labels[1][row]) - log_p(logits["ref l"][row], labels[1][row])
        total += float(torch.tensor(0.3 * (w - lost)).neg().exp().add(1).log())
    assert found == pytest.approx(total / 3, rel=1e-5)


def margin(model, pair):
    """Mean log p(preferred) - log p(other)."""
    found = []
    for task, sign in zip(pair, (1, -1), strict=True):
        collate = task.collator(h.tokenizer())
        for row in task.encode(h.tokenizer(), "train"):
            batch = collate([row])
            found.append(
                sign
                * log_p(h.logits(model, **{k: v for k, v in batch.items() if k != "labels"})[0], batch["labels"][0])
            )
    return 2 * sum(found) / len(found)


def test_dpo_prefers_what_is_preferred(pair):
    model = h.causal()
    before = margin(model, pair)
    with h.untouched(model):
        delta = sm.fit(model, "LN()", pair[0], objective=sm.DPO(pair[1], 0.5), tokenizer=h.tokenizer(), **QUICK)
    sm.attach(model, delta)
    assert margin(model, pair) > before + 1
    sm.detach(model)
    back = sm.fit(model, "LN()", pair[1], objective=sm.DPO(pair[0], 0.5), tokenizer=h.tokenizer(), **QUICK)
    sm.attach(model, back)
    assert margin(model, pair) < before - 1


def test_dpo_begins_at_log_2_and_pairs_stay_together(pair):
    """At the start nothing differs from the base; a partner is that of the row itself, in whatever order."""
    task, other = pair
    model = sm.attach(h.causal(), "LN()")
    objective, source = sm.DPO(other), Source(0, 4, 16, torch.device("cpu"))
    beside = Beside.of(objective, model, task, h.tokenizer(), source)
    rows, collate = task.encode(h.tokenizer(), "train"), task.collator(h.tokenizer())
    places = [5, 1, 11]
    found = loss_of(model, collate([rows[i] for i in places]), objective, beside, At(places=places))
    assert float(found.detach()) == pytest.approx(0.6931472, rel=1e-5)
    partners = beside.batches["rejected"].at(0, places)
    for row, place in zip(partners["input_ids"], places, strict=True):
        assert row[: len(rows[place]["input_ids"]) - 2].tolist() == rows[place]["input_ids"][:-2], (
            "the prompt is the same"
        )


def test_answers_to_other_prompts_are_refused(pair):
    """A file of the other answers in another order pairs what does not belong together."""
    task, other = pair
    mixed = sm.Task(
        **{
            **vars(other),
            "splits": {"train": other.splits["train"].select(range(len(other.splits["train"]) - 1, -1, -1))},
        }
    )
    with pytest.raises(TrainError, match="answer different prompts, first row 0"):
        sm.fit(h.causal(), "LN()", task, objective=sm.DPO(mixed), tokenizer=h.tokenizer(), **QUICK)


def test_dpo_on_top_of_a_delta(pair):
    task, other = pair
    first = sm.fit(h.causal(), "LN()", task, tokenizer=h.tokenizer(), **QUICK)
    objective = sm.DPO(other, reference=first)
    losses = []

    class Notes(sm.Callback):
        def on_step(self, run):
            losses.append(run.loss)

    second = sm.fit(
        h.causal(),
        "LN()",
        task,
        start=first,
        objective=objective,
        tokenizer=h.tokenizer(),
        callbacks=[Notes()],
        **QUICK,
    )
    assert losses[0] == pytest.approx(0.6931472, rel=1e-4)
    assert losses[-1] < losses[0]
    assert second.recipe == first.recipe


def test_pairs_that_are_none_are_refused(pair, tmp_path):
    task, other = pair
    fewer = answers(tmp_path / "fewer", "bad", 12)
    options = {**QUICK, "tokenizer": h.tokenizer()}
    with pytest.raises(TrainError, match="has 12 rows beside 16 that are trained on; it takes a pair for each"):
        sm.fit(h.causal(), "LN()", task, objective=sm.DPO(fewer), **options)
    with pytest.raises(TrainError, match="row by row, which batching='pack' puts several of into one"):
        sm.fit(h.causal(), "LN()", task, objective=sm.DPO(other), batching="pack", **options)
    with pytest.raises(SmidgenError, match="a classification task has none"):
        sm.fit(h.bert(), "LN()", h.task(tmp_path / "films"), objective=sm.DPO(other), **options)
    with pytest.raises(SmidgenError, match=r"beta=0 must be above 0"):
        sm.DPO(other, 0)
    with pytest.raises(SmidgenError, match=r"weight=-1 must not be negative"):
        sm.GradientDifference(other, -1)


def test_gradient_difference_is_its_formula(pair):
    task, kept = pair
    model = sm.attach(h.causal(), "LN()")
    objective = sm.GradientDifference(kept, 0.6)
    beside = Beside.of(objective, model, task, h.tokenizer(), Source(0, 4, 16, torch.device("cpu")))
    rows, collate = task.encode(h.tokenizer(), "train"), task.collator(h.tokenizer())
    batch, retain = collate([rows[i] for i in range(4)]), beside.batches["retain"].at(0)
    found = float(loss_of(model, batch, objective, beside).detach())

    def mean(batch):
        logits = h.logits(model, **{k: v for k, v in batch.items() if k != "labels"})
        labels = batch["labels"]
        total = sum(log_p(logits[i], labels[i]) for i in range(len(labels)))
        return -total / int((labels[:, 1:] != -100).sum())

    assert found == pytest.approx(0.6 * mean(retain) - mean(batch), rel=1e-4)


def test_gradient_difference_forgets_one_and_keeps_the_other(pair):
    forget, kept = pair
    alone = sm.Task(**{**vars(forget), "splits": {"train": forget.splits["train"]}})
    model = h.causal()
    first = sm.fit(model, "LN()", kept, tokenizer=h.tokenizer(), **QUICK)
    with pytest.warns(UserWarning, match="the last epoch"):
        delta = sm.fit(
            model, "LN()", alone, start=first, objective=sm.GradientDifference(kept), tokenizer=h.tokenizer(), **QUICK
        )
    before, after = ({n: score(model, t, d) for n, t in (("forget", forget), ("kept", kept))} for d in (first, delta))
    assert after["forget"] > before["forget"] + 0.2, (before, after)  # descent would have lowered it
    assert after["kept"] < before["kept"], (before, after)


def score(model, task, delta):
    return sm.evaluate(model, task, delta=delta, split="train", tokenizer=h.tokenizer()).values["loss"]


def test_partners_are_of_the_rows_that_are_asked_for(pair):
    task, other = pair
    feed = OtherBatches.of(
        Batches(other, aligned=True), task, h.tokenizer(), h.causal(), Source(0, 4, 16, torch.device("cpu"))
    )
    one, two = feed.at(0, [2, 3]), feed.at(7, [3, 2])
    assert torch.equal(one["input_ids"], two["input_ids"].flip(0))
