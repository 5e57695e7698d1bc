"""Deltas that an earlier version wrote (tests/data/format1/write.py says how) load, compute the same, and go back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

import smidgen as sm

FOLDER = Path(__file__).parent / "data" / "format1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
NAMES = ["ln-select", "lora-head", "prefix-prompt"]


def base():
    return BertForSequenceClassification.from_pretrained(FOLDER / "base").eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(EXPECTED["input_ids"])).logits


@pytest.mark.parametrize("name", NAMES)
def test_it_computes_what_it_did(name):
    model = sm.attach(base(), sm.Delta.load(FOLDER / name))
    torch.testing.assert_close(logits(model), torch.tensor(EXPECTED[name]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_it_comes_back_bit_for_bit(name, tmp_path):
    delta = sm.Delta.load(FOLDER / name)
    model = sm.attach(base(), delta)
    sm.detach(model).save(tmp_path / name)
    before, after = (load_file(folder / name / "delta.safetensors") for folder in (FOLDER, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    fields = ("format_version", "recipe", "head", "pooling", "labels")
    one, other = (json.loads((folder / name / "delta.json").read_text()) for folder in (FOLDER, tmp_path))
    assert [one[field] for field in fields] == [other[field] for field in fields]


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_value_is_seen(name, tmp_path):
    folder = tmp_path / name
    sm.Delta.load(FOLDER / name).save(folder)
    tensors = load_file(folder / "delta.safetensors")
    trained = {k: t for k, t in tensors.items() if t.is_floating_point() and not k.startswith("classifier")}
    save_file(tensors | {k: t + 0.5 for k, t in trained.items()}, folder / "delta.safetensors")
    model = sm.attach(base(), sm.Delta.load(folder))
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(logits(model), torch.tensor(EXPECTED[name]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_another_base_is_refused(name):
    model = base()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] += 1
    with pytest.raises(sm.DeltaError, match="another base|differs|fingerprint|base"):
        sm.attach(model, sm.Delta.load(FOLDER / name))
