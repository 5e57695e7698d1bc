"""Packed rows: every example as if it were alone, little padding, and models that cannot are refused."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from torch import nn

import smidgen as sm
from smidgen.common.errors import TrainError
from smidgen.data.batching import PackedBatches
from smidgen.data.text.collate import Collator
from smidgen.efficiency.packing import packer as pack
from smidgen.efficiency.packing.isolation_check import packer_for
from smidgen.efficiency.packing.packer import Packer
from smidgen.training.run.batch_feed import Feed
from smidgen.training.run.loop import Loop
from smidgen.training.run.settings import Settings
from tests import helpers as h

LENGTHS = random.Random(1).choices((2, 5, 9, 14, 30, 64), k=1000)
COLLATE = Collator({"input_ids": 0, "attention_mask": 0})


def examples(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(4, len(h.WORDS), (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)} for ids in tokens]


def opt(**options):
    config = T.OPTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16, dropout=0.0,
        vocab_size=len(h.WORDS), max_position_embeddings=40, **h.TOKENS, **options,
    )  # fmt: skip
    return shaken(T.OPTForCausalLM, config)


def mamba():
    return shaken(T.MambaForCausalLM, T.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, vocab_size=20))


def bloom():
    return shaken(T.BloomForCausalLM, T.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=len(h.WORDS)))


def shaken(cls, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls._from_config(config).eval()
    h.shake(model.parameters(), 0.3)
    return model


MODELS = {"gpt2": lambda **o: h.causal("gpt2", **o), "llama": lambda **o: h.causal("llama", **o), "opt": opt}
SOME = examples(3, 9, 1, 6, 2)


def packer_of(model, some=SOME, capacity=32):
    return packer_for(model, some, [len(e["input_ids"]) for e in some], COLLATE, capacity)


def alone(model, example):
    return h.logits(model, input_ids=torch.tensor([example["input_ids"]]))[0]


def apart(model, batch):
    """Largest difference of logits of SOME, packed as 3 + 9 + 1 and 6 + 2, from those alone."""
    with torch.no_grad():
        found = model(**batch).logits
    parts = [found[0, :3], found[0, 3:12], found[0, 12:13], found[1, :6], found[1, 6:8]]
    return max(float((part - alone(model, e)).abs().max()) for part, e in zip(parts, SOME, strict=True))


# What a model computes


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_examples_are_as_alone(name, attention):
    model = MODELS[name](attn_implementation=attention)
    packer = packer_of(model)
    assert (packer.mask is None) == (name != "opt"), "OPT does not look at positions to find packed examples"
    batch = packer([SOME[:3], SOME[3:]])
    assert apart(model, batch) < 1e-5
    padded = COLLATE(SOME)
    with torch.no_grad():
        assert float(model(**batch).loss) == pytest.approx(float(model(**padded).loss), abs=1e-5)


def without_restart(batch):
    return {**batch, "position_ids": torch.arange(13).expand(2, -1)}


def with_key_cache(batch):
    return {**batch, "use_cache": True}


def with_plain_mask(batch):
    return {**batch, "attention_mask": torch.ones(2, 13, dtype=torch.long)}


@pytest.mark.parametrize("broken", [without_restart, with_key_cache, with_plain_mask])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_examples_that_see_others_would_be_seen(name, broken):
    model = MODELS[name]()
    assert apart(model, broken(Packer()([SOME[:3], SOME[3:]]))) > 1e-2


def test_nothing_is_predicted_across_a_border():
    batch = Packer()([SOME[:3], SOME[3:]])
    positions = [[*range(3), *range(9), 0], [*range(6), *range(2), *range(5)]]
    assert batch["position_ids"].tolist() == positions
    for row, parts in zip(batch["labels"].tolist(), (SOME[:3], SOME[3:]), strict=True):
        wanted = [label for e in parts for label in [-100, *e["labels"][1:]]]
        assert row == wanted + [-100] * (13 - len(wanted))
    learned = sum(len(e["labels"]) - 1 for e in SOME)
    assert int((batch["labels"] != -100).sum()) == learned


def test_a_label_across_a_border_would_be_seen():
    model = h.causal()
    batch = Packer()([SOME[:3], SOME[3:]])
    batch["labels"][0, 3] = SOME[1]["labels"][0]
    with torch.no_grad():
        off = float(model(**batch).loss) - float(model(**COLLATE(SOME)).loss)
    assert abs(off) > 1e-4


def test_masked_prompts_stay_masked():
    asked = examples(4, 5)
    for example in asked:
        example["labels"][:2] = [-100, -100]
    labels = Packer()([asked])["labels"][0].tolist()
    assert labels == [-100, -100, *asked[0]["labels"][2:], -100, -100, *asked[1]["labels"][2:]]


# The trial


@pytest.mark.parametrize("make", [mamba, bloom])
def test_models_that_mix_examples_are_found_out(make):
    model = make()
    with h.untouched(model), pytest.raises(TrainError, match="keeps packed examples apart; with .* logits differ") as e:
        packer_of(model)
    assert "\n" not in str(e.value)
    assert "use batching='length'" in str(e.value)


def test_a_model_that_takes_no_positions_is_refused():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = h.causal()

        def forward(self, input_ids, attention_mask=None, labels=None):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    with pytest.raises(TrainError, match="with Plain a forward pass on them fails .*unexpected keyword argument"):
        packer_of(Plain())


def test_a_loss_that_is_no_mean_over_tokens_is_refused():
    class PerRow(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = h.causal()

        def forward(self, labels=None, **batch):
            logits = self.inner(**batch).logits
            kept = labels[:, 1:] != -100
            each = nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
            return SimpleNamespace(logits=logits, loss=(each.sum(1) / kept.sum(1)).mean())

    with pytest.raises(TrainError, match="with PerRow their loss is .* that of the same examples padded"):
        packer_of(PerRow())


def test_a_window_that_a_whole_mask_would_hide_is_seen():
    """A model with a sliding window is packed by positions; the trial would not take the mask for it."""
    config = T.MistralConfig(**h.BASE, **h.TOKENS, num_key_value_heads=1, sliding_window=4)
    model = shaken(T.MistralForCausalLM, config)
    assert packer_of(model) == Packer()
    assert apart(model, Packer()([SOME[:3], SOME[3:]])) < 1e-5
    assert apart(model, Packer(torch.float32)([SOME[:3], SOME[3:]])) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_other_dtypes(name, dtype):
    packer = packer_of(MODELS[name]().to(dtype))
    assert packer.mask in (None, dtype)


def test_where_no_two_examples_fit_nothing_is_tried():
    assert packer_of(mamba(), examples(20, 25, 30)) == Packer()
    with pytest.raises(TrainError):
        packer_of(mamba(), examples(20, 25, 7))


# Rows and batches


def packed(epoch=0, seed=0, size=8, capacity=64, **options):
    return list(PackedBatches(LENGTHS, capacity, size, seed, epoch, **options))


def flat(batches):
    return [row for batch in batches for row in batch]


def test_every_example_comes_once_and_rows_are_never_over_full():
    for epoch in range(3):
        for capacity in (64, 65, 200):
            rows = flat(packed(epoch, capacity=capacity))
            assert sorted(i for row in rows for i in row) == list(range(len(LENGTHS)))
            assert max(sum(LENGTHS[i] for i in row) for row in rows) <= capacity
    assert any(sum(LENGTHS[i] for i in row) > 64 for row in flat(packed(capacity=65))), "a row over 64 would be seen"


def test_rows_are_nearly_full():
    rows = flat(packed())
    assert sum(LENGTHS) > 0.95 * 64 * len(rows)
    assert all(len(batch) == 8 for batch in packed()[:-1])


def test_rows_and_batches_are_shuffled_anew_every_epoch():
    first, second = packed(0), packed(1)
    assert first == packed(0)
    both = [{frozenset(row) for row in flat(batches) if len(row) > 1} for batches in (first, second)]
    assert len(both[0] & both[1]) < 0.02 * len(both[0])
    mean = [sum(len(row) for row in flat(packed(epoch)[:8])) for epoch in range(40)]
    assert sum(mean) / 40 == pytest.approx(64 * len(LENGTHS) / len(flat(first)), rel=0.1), "first rows are as all are"


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_same_packed_batches(world):
    whole = packed()
    shares = [packed(rank=rank, world=world) for rank in range(world)]
    for index, batch in enumerate(whole):
        parts = [share[index] for share in shares]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert sorted(row for part in parts for row in part) == sorted(batch), "each row in one process"
    assert packed(skip=3) == whole[3:]


# fit


def talk(count, start=0):
    rows = h.rows(count, start)
    return [{"prompt": "the film was", "completion": " ".join(r["text"].split()[3:] * (1 + i % 3))}
            for i, r in enumerate(rows)]  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return h.task(tmp_path_factory.mktemp("task"), 48, 8, talk, kind="causal-lm")


def fit(task, model=None, out=None, recipe="LN()", **options):
    settings = {"epochs": 2, "batch_size": 3, "batching": "pack", "progress": False, "max_length": 24, **options}
    return sm.fit(model or h.causal(), recipe, task, tokenizer=h.tokenizer(), out=out, **settings)


def fed(monkeypatch, stop=0):
    """What every step is fed; before step `stop`, an error."""
    seen, original = [], Loop._step

    def step(self, places, batch):
        if len(seen) + 1 == stop:
            raise InterruptedError
        seen.append({k: v.tolist() for k, v in batch.items() if isinstance(v, torch.Tensor)})
        seen[-1]["examples"] = len(places)
        return original(self, places, batch)

    monkeypatch.setattr(Loop, "_step", step)
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_fit_packs(name, task, tmp_path, monkeypatch):
    model = MODELS[name]()
    with h.untouched(model), monkeypatch.context() as patch:
        batches = fed(patch)
        delta = fit(task, model, tmp_path / "run")
    assert delta.info["steps"] == len(batches)
    assert sum(batch["examples"] for batch in batches) == 2 * 48
    assert len(batches) < 2 * 48 / 3 / 2, "several examples share a row"
    assert all(len(batch["input_ids"][0]) <= 24 for batch in batches)
    assert all(("attention_mask" in batch) == (name == "opt") for batch in batches)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "packed rows hold several examples" in record["chosen"]["cache"]
    before = sm.evaluate(model, task, split="validation", tokenizer=h.tokenizer()).value
    assert delta.info["scores"]["validation perplexity"] < before


def test_a_packed_step_is_that_of_the_same_examples_padded(task, monkeypatch):
    """With all examples in one batch the order does not matter."""
    options = {"batch_size": 100, "epochs": 1, "lr": 1e-3}
    losses = {}
    for batching in ("pack", "shuffle"):
        with monkeypatch.context() as patch:
            seen = losses[batching] = []
            original = Loop._loss

            def loss(self, model, batch, at=None, seen=seen, original=original):
                seen.append(original(self, model, batch, at))
                return seen[-1]

            patch.setattr(Loop, "_loss", loss)
            fit(task, batching=batching, **options)
    one, other = losses["pack"][-1], losses["shuffle"][-1]
    assert float(one.detach()) == pytest.approx(float(other.detach()), rel=1e-5)


def test_gradients_are_those_of_the_padded_batch():
    model, grads = h.causal(), []
    for batch in (Packer()([SOME[:3], SOME[3:]]), COLLATE(SOME), COLLATE(SOME[:3])):
        model.zero_grad()
        model(**batch).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)
    assert (grads[0] - grads[2]).abs().max() > 1e-2, "fewer examples would be seen"


def test_packed_runs_resume_at_any_step(task, tmp_path, monkeypatch):
    options = {"recipe": "LN() + LoRA(rank=2, dropout=0.2)", "checkpoint_steps": 2}
    with monkeypatch.context() as patch:
        batches = fed(patch)
        whole = fit(task, **options)
    for stop in range(2, len(batches) + 1, 3):
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            fed(patch, stop)
            fit(task, out=tmp_path / f"run-{stop}", **options)
        with monkeypatch.context() as patch:
            rest = fed(patch)
            h.same(fit(task, out=tmp_path / f"run-{stop}", **options), whole)
        assert rest == batches[-len(rest) :]
        assert len(batches) - stop + 1 <= len(rest) < len(batches) - stop + 4


def test_the_reference_of_an_objective_is_packed_too(task):
    fit(task, objective=sm.StayClose(0.5))


def test_a_packer_without_borders_would_be_seen(task, monkeypatch):
    """Were the trial not there, a packer whose positions run on would go unnoticed; it is refused."""
    monkeypatch.setattr(pack, "_positions", lambda row, length: torch.arange(length))
    with pytest.raises(TrainError, match="keeps packed examples apart"):
        fit(task)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_tokens": 100}, "batch_tokens=100 is for rows of like length, batching='pack' for rows of max_length"),
        ({"cache": True}, "cache=True, but packed rows hold several examples"),
        ({"model": mamba}, "keeps packed examples apart; with MambaForCausalLM"),
    ],
)
def test_what_cannot_be(options, said, task):
    model = options.pop("model", h.causal)()
    with h.untouched(model), pytest.raises(TrainError, match=said) as error:
        fit(task, model, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("classification", "a classification head reads one token"), ("tokens", "models that tag tokens look both ways")],
)
def test_other_kinds_say_why(kind, said, tmp_path):
    row = {"tokens": ["good", "film"], "tags": ["B-X", "O"]} if kind == "tokens" else None
    task = h.task(tmp_path, make=(lambda count, start=0: [row] * count) if row else h.rows)
    assert task.kind == kind
    with pytest.raises(TrainError, match=f"batching='pack' is for causal-lm and chat, not {kind}: {said}"):
        fit(task, h.bert())


def test_steps_of_packed_epochs_are_counted(task):
    rows = task.encode(h.tokenizer(), "train", max_length=24)
    feed = Feed(rows, COLLATE, Settings(epochs=5, batch_size=2, batching="pack"), 0, 1, torch.device("cpu"))
    assert feed.steps == sum(len(list(feed.epoch(epoch))) for epoch in range(5))
    assert next(feed.epoch(1, 2))[0] == list(feed.epoch(1))[2][0]
