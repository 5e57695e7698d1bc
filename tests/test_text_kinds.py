"""Masked language modelling, sequence to sequence, and answers that are spans: examples, losses, metrics, training."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as T

import smidgen as sm
from smidgen.common.errors import DataError, TrainError
from smidgen.data.spans import exact_match, span_f1
from smidgen.importance.fisher_information import attached_fisher
from smidgen.testing.cases import shake
from tests import helpers as h

OPTIONS = {"progress": False, "batch_size": 8, "lr": 0.01}


def masking():
    made = h.tokenizer()
    made.mask_token = "[UNK]"
    return made


def t5():
    sizes = {"vocab_size": len(h.WORDS), "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    torch.manual_seed(0)
    config = T.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, eos_token_id=3, pad_token_id=0)
    model = T.T5ForConditionalGeneration(config).eval()
    shake(model.parameters(), 0.1)
    return model


def still(cls):
    return h.build("bert", cls, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def plain(count, start=0):
    return [{"text": row["text"]} for row in h.rows(count, start)]


def written(count, start=0):
    rows = h.rows(count, start)
    return [{"source": row["text"], "target": "good" if row["label"] == "pos" else "bad"} for row in rows]


def questions(count, start=0):
    """What was the film? The word behind "was"."""
    rows = []
    for i in range(start, start + count):
        word = (*h.KINDS["pos"], *h.KINDS["neg"])[i % 6]
        fill = " ".join(h.WORDS[10 + (i + k) % 2] for k in range(i % 4))
        context = f"{fill} the film was {word} and so it is".strip()
        answers = {"text": [word], "answer_start": [context.index(word)]}
        rows.append({"question": "the film was", "context": context, "answers": answers})
    return rows


@pytest.fixture
def hidden(tmp_path):
    return h.task(tmp_path, make=plain, kind="masked-lm")


@pytest.fixture
def translated(tmp_path):
    return h.task(tmp_path, make=written, kind="seq2seq")


@pytest.fixture
def answered(tmp_path):
    return h.task(tmp_path, make=questions, kind="span-qa")


def test_a_share_of_tokens_is_hidden_by_the_text_alone(hidden):
    tokenizer = masking()
    rows, again = (hidden.encode(tokenizer, "train") for _ in range(2))
    assert [row == other for row, other in zip(rows, again, strict=True)] == [True] * len(rows)
    originals = tokenizer(hidden.splits["train"]["text"][:])["input_ids"]
    for row, ids in zip(rows, originals, strict=True):
        labels = np.array(row["labels"])
        assert (labels != -100).sum() == max(1, round(0.15 * (len(ids) - 2)))
        assert labels[0] == labels[-1] == -100
        kept = labels == -100
        assert np.array_equal(np.array(row["input_ids"])[kept], np.array(ids)[kept])
        assert np.array_equal(labels[~kept], np.array(ids)[~kept])
    with pytest.raises(DataError, match="masked-lm needs a mask token, which "):
        hidden.encode(h.tokenizer(), "train")


def test_eight_tenths_are_masked_and_one_stays(tmp_path):
    rng = np.random.RandomState(0)
    text = [{"text": " ".join(rng.choice(h.WORDS[4:], 28))} for _ in range(400)]
    task = sm.Task.load(h.jsonl(tmp_path / "train.jsonl", text), kind="masked-lm", validation=0)
    tokenizer = masking()
    rows = task.encode(tokenizer, "train")
    pairs = [(i, t) for row in rows for i, t in zip(row["input_ids"], row["labels"], strict=True) if t != -100]
    masked = np.mean([i == tokenizer.mask_token_id for i, _ in pairs])
    same = np.mean([i == t for i, t in pairs])
    assert masked == pytest.approx(0.8 + 0.1 / 20, abs=0.03)
    assert same == pytest.approx(0.1 + 0.1 / 20, abs=0.03)


@pytest.mark.parametrize("name", ["hidden", "translated"])
def test_the_models_loss_is_that_of_the_metric(name, request):
    task = request.getfixturevalue(name)
    model, tokenizer = (still("AutoModelForMaskedLM"), masking()) if name == "hidden" else (t5(), h.tokenizer())
    scores = sm.evaluate(model, task, tokenizer=tokenizer, split="validation")
    rows = task.encode(tokenizer, "validation")
    with torch.no_grad():
        loss = float(model(**task.collator(tokenizer, model=model)(list(rows))).loss)
    assert scores.values["loss"] == pytest.approx(loss, rel=1e-5)
    assert scores.value == pytest.approx(math.exp(loss), rel=1e-5)


def test_hidden_words_are_learned_and_filled_in(hidden, tmp_path):
    model, tokenizer = still("AutoModelForMaskedLM"), masking()
    before = sm.evaluate(model, hidden, tokenizer=tokenizer).values["loss"]
    with h.untouched(model):
        delta = sm.fit(model, "LN() + LoRA(rank=2)", hidden, tokenizer=tokenizer, epochs=3, **OPTIONS)
    assert sm.evaluate(model, hidden, delta=delta, tokenizer=tokenizer).values["loss"] < before
    (row,) = sm.predict(model, ["the film [UNK] good"], delta=delta, tokenizer=tokenizer)
    assert len(row.probabilities) == 5
    assert row.answer.split()[0] == "the"
    with pytest.raises(DataError, match="has no \\[UNK\\] to fill in"):
        sm.predict(model, ["the film"], delta=delta, tokenizer=tokenizer)


def test_running_text_is_read(tmp_path):
    (tmp_path / "t.txt").write_text("the film was good\n\n" * 60)
    task = sm.Task.load(tmp_path / "t.txt", kind="masked-lm")
    assert task.kind == "masked-lm"
    assert all(len(row["input_ids"]) <= 32 for row in task.encode(masking(), "train"))
    assert sm.Task.load(tmp_path / "t.txt").kind == "causal-lm"


def test_a_text_is_written_from_another(translated, tmp_path):
    model, tokenizer = t5(), h.tokenizer()
    before = sm.evaluate(model, translated, tokenizer=tokenizer).values["loss"]
    delta = sm.fit(model, "LoRA(rank=4)", translated, tokenizer=tokenizer, epochs=6, **OPTIONS)
    assert sm.evaluate(model, translated, delta=delta, tokenizer=tokenizer).values["loss"] < before
    (row,) = sm.predict(model, ["the film was great"], delta=delta, tokenizer=tokenizer, max_new_tokens=3)
    assert isinstance(row.answer, str)


def test_spans_of_tokens_are_those_of_characters(answered, tmp_path):
    tokenizer = h.tokenizer()
    rows = answered.encode(tokenizer, "train")
    for row, made in zip(rows, answered.splits["train"], strict=True):
        first, last = row["labels"]
        said = row["context"][row["spans"][first][0] : row["spans"][last][1]]
        assert said == made["answers"]["text"][0]
    with pytest.raises(DataError, match=r"train row 0: 'good' does not stand at 1 of its context"):
        bad = [{**row, "answers": {"text": ["good"], "answer_start": [1]}} for row in questions(20)]
        sm.Task.load(h.jsonl(tmp_path / "bad.jsonl", bad), kind="span-qa")


def long_questions(count, start=0):
    """The same with so much around that a row takes one to six windows of 16 tokens."""
    rows = []
    for i, row in enumerate(questions(count, start)):
        before, after = (" ".join(h.WORDS[4 + (i + k) % 16] for k in range(n)) for n in (5 * (i % 4), 3 * (i % 3)))
        context = f"{before} {row['context']} {after}".strip()
        at = len(before) + row["answers"]["answer_start"][0] + (1 if before else 0)
        rows.append({**row, "context": context, "answers": {**row["answers"], "answer_start": [at]}})
    return rows


def test_a_text_that_is_too_long_is_read_in_windows(tmp_path):
    task, tokenizer, length = h.task(tmp_path, make=long_questions, kind="span-qa"), h.tokenizer(), 16
    whole, cut = (task.encode(tokenizer, "train", max_length=most) for most in (64, length))
    assert cut.truncated == 0
    counts = []
    for row, full in enumerate(whole):
        parts = [example for example in cut if example["row"] == row]
        counts.append(len(parts))
        if len(full["input_ids"]) <= length:
            assert parts == [full]
            continue
        said = full["answers"][0]
        inside = [[i for i, s in enumerate(part["spans"]) if s is not None] for part in parts]
        tokens = [s for s in full["spans"] if s is not None]
        assert all(len(part["input_ids"]) <= length for part in parts)
        seen = [[part["spans"][i] for i in places] for part, places in zip(parts, inside, strict=True)]
        room = max(map(len, seen))
        starts = [tokens.index(spans[0]) for spans in seen]
        assert starts == [k * (room - room // 2) for k in range(len(parts))]  # half of each is also in the next
        assert [tokens[s : s + len(spans)] for s, spans in zip(starts, seen, strict=True)] == seen
        assert seen[-1][-1] == tokens[-1]
        at = full["spans"][full["labels"][0]]
        for part, spans in zip(parts, seen, strict=True):
            if at in spans:
                first, last = part["labels"]
                assert part["context"][part["spans"][first][0] : part["spans"][last][1]] == said
            else:
                assert part["labels"] == [0, 0]
        assert any(at in spans for spans in seen)
    assert set(counts) >= {1, 2, 3}
    with pytest.raises(DataError, match=r"max_length=7 leaves room for 1 tokens .* must be at least 8"):
        task.encode(tokenizer, "train", max_length=7)


def test_an_answer_that_a_window_cuts_is_none(tmp_path):
    words = [h.WORDS[4 + k % 16] for k in range(40)]
    context, said = " ".join(words), " ".join(words[10:14])
    row = {"question": "the", "context": context, "answers": {"text": [said], "answer_start": [context.index(said)]}}
    task = sm.Task.load(h.jsonl(tmp_path / "x.jsonl", [row]), kind="span-qa", validation=0)
    found = task.encode(h.tokenizer(), "train", max_length=12)  # windows of 8 words, each from the middle of the last
    whole = [(part["spans"][2 + 1] is not None, part["labels"]) for part in found]
    begins = [words.index(context[part["spans"][3][0] : part["spans"][3][1]]) for part in found]
    assert begins[:4] == [0, 4, 8, 12]
    assert [labels for _, labels in whole][:4] == [[0, 0], [0, 0], [3 + 2, 3 + 5], [0, 0]]


@pytest.mark.parametrize("size", [1, 5])
def test_a_rows_answer_is_that_of_its_best_window(size, tmp_path):
    task, tokenizer = h.task(tmp_path, make=long_questions, kind="span-qa"), h.tokenizer()
    model = still("AutoModelForQuestionAnswering")
    shake(model.parameters(), 0.5)
    found = sm.evaluate(model, task, tokenizer=tokenizer, split="validation", max_length=16, batch_size=size)
    rows = task.splits["validation"]
    assert found.references == [row["answers"]["text"] for row in rows]
    best = [(-math.inf, "")] * len(rows)
    for part in task.encode(tokenizer, "validation", max_length=16):
        batch = {key: torch.tensor([part[key]]) for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            ends = model(**batch)
        for i, first in enumerate(part["spans"]):
            for k, last in enumerate(part["spans"]):
                if first is not None and last is not None and i <= k:
                    score = float(ends.start_logits[0, i] + ends.end_logits[0, k])
                    best[part["row"]] = max(best[part["row"]], (score, part["context"][first[0] : last[1]]))
    assert found.predictions == [text for _, text in best]


def test_answers_in_long_texts_are_learned(tmp_path):
    task, tokenizer = h.task(tmp_path, make=long_questions, kind="span-qa"), h.tokenizer()
    model = still("AutoModelForQuestionAnswering")
    delta = sm.fit(
        model, "LN() + LoRA(rank=2)", task, tokenizer=tokenizer, epochs=12, max_length=16, head_lr=0.02, **OPTIONS
    )
    found = sm.evaluate(model, task, delta=delta, tokenizer=tokenizer)
    rows = task.splits["test"]
    said = sm.predict(model, rows["question"][:], pairs=rows["context"][:], delta=delta, tokenizer=tokenizer)
    assert [each.answer for each in said] == found.predictions
    assert found.value > 0.6


def test_the_span_loss_is_the_formula_and_does_not_depend_on_padding(answered):
    model, tokenizer = still("AutoModelForQuestionAnswering"), h.tokenizer()
    rows = list(answered.encode(tokenizer, "train"))[:4]
    kind, losses = answered.task_kind, []
    for row in rows:
        batch = kind.collator(tokenizer)([row])
        with torch.no_grad():
            found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        ends = torch.stack([found.start_logits[0], found.end_logits[0]])
        losses.append(F.cross_entropy(ends, torch.tensor(row["labels"])))
    for multiple in (1, 32):
        found = kind.forward(model, kind.collator(tokenizer, multiple)(rows)).loss
        torch.testing.assert_close(found, torch.stack(losses).mean())


def test_answers_are_learned(answered, tmp_path):
    model, tokenizer = still("AutoModelForQuestionAnswering"), h.tokenizer()
    with h.untouched(model):
        delta = sm.fit(model, "LN() + LoRA(rank=2)", answered, tokenizer=tokenizer, epochs=12, out=tmp_path / "run",
                       head_lr=0.02, **OPTIONS)  # fmt: skip
    found = sm.evaluate(model, answered, delta=delta, tokenizer=tokenizer)
    assert list(found.values) == ["span_f1", "exact_match"]
    assert found.value > 0.8
    why = json.loads((tmp_path / "run" / "run.json").read_text())["chosen"]["cache"]
    assert why == "an answer has two ends, which the model takes under names of its own"
    rows = sm.predict(
        model, ["the film was"], pairs=["the film was awful and so it is"], delta=delta, tokenizer=tokenizer
    )
    assert rows[0].answer == "awful"
    with pytest.raises(TrainError, match="batching='pack' is for causal-lm and chat, not span-qa"):
        sm.fit(model, "LN()", answered, tokenizer=tokenizer, batching="pack", **OPTIONS)


@pytest.mark.parametrize("name", ["hidden", "answered"])
def test_fisher_is_that_of_one_example_at_a_time(name, request):
    task, tokenizer = request.getfixturevalue(name), masking()
    classes = {"hidden": "AutoModelForMaskedLM", "answered": "AutoModelForQuestionAnswering"}
    model = still(classes[name]).double()
    with sm.attached(model, "LN()"):
        many, one = (attached_fisher(model, task, 6, tokenizer=tokenizer, batch_size=size) for size in (4, 1))
    for key, value in many.items():
        torch.testing.assert_close(value, one[key], rtol=1e-4, atol=1e-12)
    with pytest.raises(DataError, match="kind='expected' would sum over all"):
        sm.fisher(model, task, kind="expected", tokenizer=tokenizer)


def test_squads_metrics_by_hand():
    assert exact_match(["The Cat!"], [["a cat"]]) == 1.0
    assert exact_match(["cats"], [["cat", "dog"]]) == 0.0
    assert span_f1(["the black cat sat"], [["black cat"]]) == pytest.approx(2 * 2 / (3 + 2))
    assert span_f1(["dog", "cat"], [["cat"], ["dog", "cat"]]) == 0.5
    assert span_f1([""], [[]]) == exact_match([""], [[]]) == 1.0
    assert span_f1(["x"], [[]]) == 0.0


def test_squads_files_are_read(tmp_path):
    rows = questions(20)
    qas = []
    for row in rows:
        answer = {"text": row["answers"]["text"][0], "answer_start": row["answers"]["answer_start"][0]}
        qas.append({"context": row["context"], "qas": [{"question": row["question"], "answers": [answer]}]})
    (tmp_path / "x.json").write_text(json.dumps({"data": [{"paragraphs": qas}]}))
    task = sm.Task.load(tmp_path / "x.json", validation=2)
    assert (task.kind, sum(map(len, task.splits.values()))) == ("span-qa", 20)


def test_xquad(shared):
    task = sm.Task.load(shared / "xquad" / "xquad.en.json", validation=0.1)
    assert task.kind == "span-qa"
    assert sum(len(rows) for rows in task.splits.values()) == 1190
