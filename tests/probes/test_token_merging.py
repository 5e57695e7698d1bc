"""Probe: tokens are merged behind block 2 of 4; a head for tokens reads through the index map; no line in src/."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers as T

import smidgen as sm
from smidgen.common.errors import AttachError
from smidgen.ports.attachment_record import trained_parameters
from smidgen.recipe.recipe import Term
from smidgen.testing.cases import shake
from tests import helpers as h
from tests.probes.own_merging import PairMerging

SOURCE = Path(sm.__file__).parent
Term.registry.pop("PairMerging")


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(Term.registry, "PairMerging", PairMerging)


def build(kind, auto):
    """A tiny model of four blocks in eval mode, with shaken values."""
    config = h.CONFIGS[kind]()
    config.num_hidden_layers = 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(T, auto).from_config(config).eval()
    shake(model.parameters(), 0.3)
    return model


CASES = [
    ("bert", "AutoModelForTokenClassification"),
    ("bert", "AutoModelForSequenceClassification"),
    ("llama", "AutoModelForTokenClassification"),
    ("llama", "AutoModelForSequenceClassification"),
    ("gpt2", "AutoModelForTokenClassification"),
]


def lengths(model, batch):
    """How many tokens each block computes."""
    (row,) = model._smidgen.plan.entries
    found, handles = [], []
    for path in (f"{row.site.stack}.{i}" for i in range(4)):
        block = model.get_submodule(path)
        handles.append(block.register_forward_pre_hook(lambda m, a, k: found.append(first(a, k)), with_kwargs=True))
    h.logits(model, **batch)
    for handle in handles:
        handle.remove()
    return found


def first(args, kwargs):
    return (args[0] if args else kwargs["hidden_states"]).shape[1]


@pytest.mark.parametrize(("kind", "auto"), CASES)
def test_blocks_above_compute_half(kind, auto):
    model, batch = build(kind, auto), h.ids(rows=3, length=7)
    plain = h.logits(model, **batch)
    sm.attach(model, PairMerging())
    found = h.logits(model, **batch)
    assert found.shape == plain.shape
    assert not torch.allclose(found, plain)
    assert lengths(model, batch) == [7, 7, 4, 4]
    with sm.disabled(model):
        assert torch.equal(h.logits(model, **batch), plain)
    sm.detach(model)
    assert torch.equal(h.logits(model, **batch), plain)


def test_a_head_for_tokens_reads_the_place_of_each():
    model = build("bert", "AutoModelForTokenClassification")
    sm.attach(model, PairMerging())
    found = h.logits(model, **h.ids(mask=False))
    for token in (1, 3, 5):
        assert torch.equal(found[:, token], found[:, token + 1])
    assert not torch.equal(found[:, 0], found[:, 1])


def test_the_blocks_above_by_hand():
    """BERT in a plain loop: merge, then two more blocks on the merged tokens with the merged mask."""
    model = build("bert", "AutoModelForTokenClassification").double().eval()
    batch = h.ids(rows=3, length=7)
    states = model(**batch, output_hidden_states=True).hidden_states[2]
    sm.attach(model, PairMerging())
    shake(trained_parameters(model).values(), 0.3)
    values = trained_parameters(model)
    v = next(p for n, p in values.items() if n.endswith(".v"))
    merged, mask = [], []
    for b in range(3):
        row, kept = [states[b, 0]], [int(batch["attention_mask"][b, 0])]
        for j in (1, 3, 5):
            w = 1 / (1 + torch.exp(-(states[b, j] @ v)))
            parts = [(w, states[b, j], batch["attention_mask"][b, j])]
            parts.append((1 - w, states[b, j + 1], batch["attention_mask"][b, j + 1]))
            used = [(share, x) for share, x, m in parts if m]
            total = sum(share for share, _ in used)
            row.append(sum(share * x for share, x in used) / total if used else torch.zeros_like(states[b, j]))
            kept.append(int(bool(used)))
        merged.append(torch.stack(row))
        mask.append(kept)
    x, kept = torch.stack(merged), torch.tensor(mask, dtype=torch.bool)
    found, head = h.logits(model, **batch), copy.deepcopy(model.classifier)
    sm.detach(model)
    for block in model.bert.encoder.layer[2:]:
        out = block(x, attention_mask=torch.where(kept[:, None, None], 0.0, -1e9))
        x = out[0] if isinstance(out, tuple) else out
    wanted = head(x[:, [0, 1, 1, 2, 2, 3, 3]])
    text = batch["attention_mask"].bool()
    assert torch.allclose(found[text], wanted[text], atol=1e-9)


def test_padding_does_not_matter():
    model = sm.attach(build("bert", "AutoModelForTokenClassification"), PairMerging())
    batch = h.ids(rows=2, length=7)
    longer = {k: torch.cat([v, torch.zeros_like(v[:, :3])], 1) for k, v in batch.items()}
    text = batch["attention_mask"].bool()
    assert torch.allclose(h.logits(model, **batch)[text], h.logits(model, **longer)[:, :7][text], atol=1e-5)


def test_it_trains_with_others_and_comes_back(tmp_path):
    model, task = build("bert", "AutoModelForSequenceClassification"), h.task(tmp_path / "task")
    recipe = sm.parse("LN()") + PairMerging()
    with h.untouched(model):
        delta = sm.fit(model, recipe, task, tokenizer=h.tokenizer(), epochs=3, batch_size=8, lr=1e-2, progress=False)
    delta.save(tmp_path / "delta")
    with sm.attached(model, sm.Delta.load(tmp_path / "delta")):
        again = h.logits(model)
    with sm.attached(model, delta):
        assert torch.equal(h.logits(model), again)


def test_a_cache_in_use_is_refused():
    model = sm.attach(build("llama", "AutoModelForCausalLM"), PairMerging())
    tokens = h.ids(mask=False)["input_ids"]
    with torch.no_grad():
        past = model(tokens, use_cache=True).past_key_values
        with pytest.raises(AttachError, match="what is in a cache was not"):
            model(tokens[:, :1].repeat(1, 3), past_key_values=past)


def test_no_line_in_src_knows_it():
    assert not [path for path in SOURCE.rglob("*.py") if "PairMerging" in path.read_text()]
