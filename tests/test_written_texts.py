"""Metrics of what a model writes: BLEU, chrF and ROUGE against plain statements, and through fit and evaluate."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter

import pytest
import torch
import transformers as T

import smidgen as sm
from smidgen.common.errors import DataError, TrainError
from smidgen.data.text_metrics import BLEU, CHRF, ROUGE
from smidgen.inference.evaluation import write_examples
from smidgen.testing.cases import shake
from tests import helpers as h
from tests.test_cli import call
from tests.test_text_kinds import OPTIONS, t5, written

SAID = ["the cat sat on the mat today", "there is no dog", "it is what it is and more"]
RIGHT = [["the cat sat on a mat today"], ["there was no dog", "there is not any dog"], ["it is what it is"]]


def marian():
    """Absolute positions, a bias of the logits, and beams by default, as opus-mt has them."""
    torch.manual_seed(0)
    config = T.MarianConfig(
        vocab_size=len(h.WORDS), d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=40, pad_token_id=0,
        eos_token_id=3, decoder_start_token_id=0, dropout=0.0, num_beams=3, forced_eos_token_id=None,
    )  # fmt: skip
    model = T.MarianMTModel(config).eval()
    model.generation_config.num_beams = 3
    shake(model.parameters(), 0.1)
    return model


@pytest.fixture
def translated(tmp_path):
    return h.task(tmp_path, make=written, kind="seq2seq", metric="bleu")


def grams(text, n):
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def test_bleu_is_the_geometric_mean_of_clipped_precisions_times_the_brevity_penalty():
    logs, (said, wanted) = [], (0, 0)
    for n in range(1, 5):
        same = total = 0
        for text, right in zip(SAID, RIGHT, strict=True):
            most = Counter()
            for each in right:
                most |= grams(each, n)
            found = grams(text, n)
            same, total = same + sum((found & most).values()), total + sum(found.values())
        logs.append(math.log(same / total))
    for text, right in zip(SAID, RIGHT, strict=True):
        length = len(text.split())
        said, wanted = said + length, wanted + min((abs(len(r.split()) - length), len(r.split())) for r in right)[1]
    brevity = min(1.0, math.exp(1 - wanted / said))
    assert BLEU.function(SAID, RIGHT) == pytest.approx(100 * brevity * math.exp(sum(logs) / 4))


def test_chrf_is_the_f2_of_mean_character_precisions_and_recalls():
    said, right, orders = "the mat", "a mat", []
    for n in range(1, 7):
        found, wanted = (
            Counter(t[i : i + n] for t in [text.replace(" ", "")] for i in range(len(t) - n + 1))
            for text in (said, right)
        )
        if found and wanted:
            same = sum((found & wanted).values())
            orders.append((same / sum(found.values()), same / sum(wanted.values())))
    p, r = (sum(values) / len(orders) for values in zip(*orders, strict=True))
    assert CHRF.function([said], [[right]]) == pytest.approx(100 * 5 * p * r / (4 * p + r))


def test_rouge_by_hand():
    said, right = ["cats sat there\nthe dog ran"], [["the cat sat\ndogs ran"]]
    values = {metric.name: metric.function(said, right) for metric in ROUGE}
    # stems: cat sat there the dog ran | the cat sat dog ran
    f = lambda same, a, b: 2 * same / (a + b)  # noqa: E731
    assert values["rouge1"] == pytest.approx(f(5, 6, 5))
    assert values["rouge2"] == pytest.approx(f(2, 5, 4))  # cat sat, dog ran
    assert values["rougeL"] == pytest.approx(f(4, 6, 5))  # cat sat dog ran
    assert values["rougeLsum"] == pytest.approx(f(5, 6, 5))  # the union, line by line
    two = [[*right[0], said[0]]]
    assert all(metric.function(said, two) == 1.0 for metric in ROUGE)  # the one that fits best


@pytest.mark.parametrize("recipe", ["LN() + LoRA(rank=2)", "Prefix(length=3)", "Adapter(width=4)"])
@pytest.mark.parametrize("make", [t5, marian])
def test_a_batch_writes_what_each_text_has_written_alone(make, recipe, translated):
    model, tokenizer = make(), h.tokenizer()
    shake(model.parameters(), 0.7)  # so that what is written depends on what is read
    encoded = translated.encode(tokenizer, "validation")
    assert len(set(encoded.lengths)) > 1  # so that there is padding
    with sm.attached(model, recipe):
        shake([p for p in model.parameters() if p.requires_grad], 0.1)
        many, one = (write_examples(model, encoded, translated, tokenizer, size, 6) for size in (8, 1))
        assert many == one
        for (text, right), row in zip(many, translated.splits["validation"], strict=True):
            ids = tokenizer(row["source"], return_tensors="pt")
            ids.pop("token_type_ids", None)
            alone = model.generate(**ids, max_new_tokens=6, do_sample=False)[0]
            assert (text, right) == (tokenizer.decode(alone, skip_special_tokens=True), [row["target"]])
    assert len({text for text, _ in many}) > 1


def test_what_is_written_decides_which_epoch_is_kept(translated, tmp_path):
    model, tokenizer = t5(), h.tokenizer()
    with h.untouched(model):
        delta = sm.fit(
            model, "LoRA(rank=4)", translated, tokenizer=tokenizer, epochs=6, out=tmp_path / "run", **OPTIONS
        )
    chosen = json.loads((tmp_path / "run" / "run.json").read_text())["chosen"]
    longest = max(len(ids) for ids in tokenizer(translated.splits["train"]["target"][:])["input_ids"])
    assert chosen["max_new_tokens"] == math.ceil(1.25 * longest)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    history = [line["validation"] for line in lines if "validation" in line]
    assert [list(entry) for entry in history] == [["bleu", "perplexity", "loss"]] * 6
    assert delta.info["scores"]["validation bleu"] == max(entry["bleu"] for entry in history)
    found = sm.evaluate(model, translated, delta=delta, tokenizer=tokenizer, split="validation")
    assert found.value == pytest.approx(delta.info["scores"]["validation bleu"])
    assert found.references == [[row["target"]] for row in translated.splits["validation"]]
    said = sm.predict(
        model, translated.splits["validation"]["source"][:], delta=delta, tokenizer=tokenizer,
        max_new_tokens=chosen["max_new_tokens"],
    )  # fmt: skip
    assert [each.answer for each in said] == found.predictions
    capped = sm.evaluate(model, translated, delta=delta, tokenizer=tokenizer, split="validation", max_new_tokens=1)
    assert all(len(text.split()) <= 1 for text in capped.predictions)


def test_bad_input(translated, tmp_path, monkeypatch):
    path = h.jsonl(tmp_path / "rows.jsonl", written(20))
    with pytest.raises(DataError, match="metric 'rouge' is unknown; did you mean 'rouge"):
        sm.Task.load(path, kind="seq2seq", metric="rouge")
    with pytest.raises(TrainError, match="max_new_tokens=0 must be at least 1"):
        sm.fit(t5(), "LN()", translated, tokenizer=h.tokenizer(), max_new_tokens=0, **OPTIONS)
    for metric, module in (("chrf", "sacrebleu"), ("rougeL", "rouge_score")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(DataError, match=r"pip install 'smidgen\[text\]'"):
                sm.Task.load(path, kind="seq2seq", metric=metric)
    assert sm.Task.load(path, kind="seq2seq", metric="chrf").metric == "chrf"


def test_by_command(tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    t5().save_pretrained(base)
    h.tokenizer().save_pretrained(base)
    data = h.jsonl(tmp_path / "rows.jsonl", written(40))
    told = ["--data", data, "--kind", "seq2seq", "--metric", "rougeL", "--max-new-tokens", 4]
    said = call("tune", "--model", base, "--out", run, "--epochs", 1, *told, "--json")
    assert said.code == 0, said.err
    assert json.loads((run / "run.json").read_text())["chosen"]["max_new_tokens"] == 4
    said = call("evaluate", "--delta", run, *told, "--split", "validation", "--json")
    assert said.code == 0, said.err
    assert list(json.loads(said.out)["scores"]) == ["rougeL", "perplexity", "loss"]
