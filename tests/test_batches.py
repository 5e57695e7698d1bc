"""Batches of like length, in rows or in tokens: every row once, little padding, and an order that is still random."""

import json
import random
from dataclasses import asdict

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import TrainError
from smidgen.common.memory import memory_guard
from smidgen.data.batching import POOL, ShuffledBatches
from smidgen.data.encoded import Encoded
from smidgen.studies.experiments.tuning_changes import lr_steps
from smidgen.training.run.batch_feed import Feed
from smidgen.training.run.loop import Loop
from smidgen.training.run.run_folder import RunFolder
from smidgen.training.run.settings import Settings
from tests import helpers as h

LENGTHS = random.Random(1).choices((5, 9, 14, 30, 64), k=1000)


def made(epoch=0, seed=0, **options):
    return list(ShuffledBatches(len(LENGTHS), 16, seed, epoch, lengths=LENGTHS, **options))


def padded(batches):
    return sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches)


def test_every_row_comes_once():
    batches = made()
    assert sorted(row for batch in batches for row in batch) == list(range(len(LENGTHS)))
    assert len(batches) == -(-len(LENGTHS) // 16)


def test_padding_is_nearly_gone():
    plain = padded(ShuffledBatches(len(LENGTHS), 16, 0, 0))
    assert padded(made()) < 1.05 * sum(LENGTHS) < 0.7 * plain


def test_rows_and_batches_are_shuffled_anew_every_epoch():
    first, second = made(0), made(1)
    assert first == made(0)
    assert first != second
    assert {frozenset(batch) for batch in first}.isdisjoint({frozenset(batch) for batch in second})
    sizes = [max(LENGTHS[row] for row in batch) for batch in first]
    assert sizes != sorted(sizes)


def test_short_batches_do_not_come_first_or_last():
    """Over many epochs a batch's place says nothing of its length."""
    halves = []
    for epoch in range(40):
        sizes = [max(LENGTHS[row] for row in batch) for batch in made(epoch)]
        halves.append(sum(sizes[: len(sizes) // 2]) / sum(sizes))
    assert abs(sum(halves) / len(halves) - 0.5) < 0.03


def test_rows_of_different_pools_never_meet():
    """The first pool is the first 50 batches' worth of the shuffled rows, as without lengths."""
    plain = list(ShuffledBatches(len(LENGTHS), 16, 0, 0))
    pool = {row for batch in plain[:POOL] for row in batch}
    for batch in made():
        assert set(batch) <= pool or pool.isdisjoint(batch)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_same_global_batches(world):
    whole = made()
    shares = [made(rank=rank, world=world) for rank in range(world)]
    for index, batch in enumerate(whole):
        assert sorted(row for share in shares for row in share[index]) == sorted(batch), "each row in one process"
    assert made(skip=3) == whole[3:]


def test_fit_takes_it_and_resumes(tmp_path):
    model, task = h.bert(), h.task(tmp_path / "data")
    options = {"tokenizer": h.tokenizer(), "epochs": 2, "batch_size": 8, "progress": False, "max_length": 16}
    by_length = sm.fit(model, "LN()", task, batching="length", out=tmp_path / "run", **options)
    h.same(by_length, sm.fit(model, "LN()", task, batching="length", **options))
    shuffled = sm.fit(model, "LN()", task, **options)
    with pytest.raises(AssertionError):
        h.same(by_length, shuffled)
    with pytest.raises(TrainError, match="settings was"):
        sm.fit(model, "LN()", task, out=tmp_path / "run", **options)
    with pytest.raises(TrainError, match="batching='len' is not one of shuffle, length"):
        sm.fit(model, "LN()", task, batching="len", **options)


# Batches of so many tokens

BUDGET = 128


def budgeted(epoch=0, seed=0, tokens=BUDGET, **options):
    return list(ShuffledBatches(len(LENGTHS), 16, seed, epoch, lengths=LENGTHS, tokens=tokens, **options))


def over(batches, tokens=BUDGET):
    """Batches whose rows, padded to the longest, take more."""
    return [batch for batch in batches if len(batch) * max(LENGTHS[row] for row in batch) > tokens]


@pytest.mark.parametrize("tokens", [64, 65, 128, 1000, 10**6])
def test_budgets_are_kept_and_every_row_comes_once(tokens):
    for epoch in range(3):
        batches = budgeted(epoch, tokens=tokens)
        assert sorted(row for batch in batches for row in batch) == list(range(len(LENGTHS)))
        assert over(batches, tokens) == []
        assert all(batches)


def test_batches_over_the_budget_would_be_seen():
    assert over(made())
    assert over(budgeted(), BUDGET - 1)


def test_budgets_are_used():
    """Only the last batch of a length or of a pool has room for another row."""
    batches = budgeted()
    room = [b for b in batches if (len(b) + 1) * max(LENGTHS[row] for row in b) <= BUDGET]
    assert len(room) <= 0.1 * len(batches)
    assert padded(batches) < 1.1 * sum(LENGTHS)


def test_budgeted_batches_are_shuffled_anew_every_epoch():
    first, second = budgeted(0), budgeted(1)
    assert first == budgeted(0)
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}
    sizes = [max(LENGTHS[row] for row in batch) for batch in first]
    assert sizes != sorted(sizes)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_same_budgeted_batches(world):
    whole = budgeted()
    shares = [budgeted(rank=rank, world=world) for rank in range(world)]
    assert {len(share) for share in shares} == {len(whole)}
    for index, batch in enumerate(whole):
        parts = [share[index] for share in shares]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert sorted(row for part in parts for row in part) == sorted(batch), "each row in one process"
    assert budgeted(skip=5) == whole[5:]


def feed(epochs=4, **settings):
    rows = Encoded([{"input_ids": [1] * length} for length in LENGTHS], 64)
    return Feed(rows, lambda examples: {}, Settings(epochs=epochs, **settings), 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("more", [{}, {"batching": "length"}, {"batch_tokens": 100}], ids=str)
def test_steps_are_the_sum_over_the_epochs(more):
    made = feed(**more)
    counts = [sum(1 for _ in made.epoch(epoch)) for epoch in range(4)]
    assert [made.before(epoch) for epoch in range(5)] == [sum(counts[:epoch]) for epoch in range(5)]
    assert made.steps == sum(counts)
    assert (len(set(counts)) > 1) == ("batch_tokens" in more), "epochs of budgeted batches are not equally long"


def test_a_row_longer_than_the_budget():
    said = r"row \d+ has 64 tokens, more than batch_tokens=63; set batch_tokens to at least 64, or max_length to .* 63"
    with pytest.raises(TrainError, match=said):
        budgeted(tokens=63)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_tokens": 0}, "batch_tokens=0 must be at least 1"),
        ({"batch_tokens": 3}, "more than batch_tokens=3; set batch_tokens to at least"),
    ],
)
def test_budgets_that_cannot_be(settings, said, tmp_path):
    model, task = h.bert(), h.task(tmp_path / "data")
    with h.untouched(model), pytest.raises(TrainError, match=said) as error:
        sm.fit(model, "LN()", task, tokenizer=h.tokenizer(), progress=False, **settings)
    assert "\n" not in str(error.value)


def test_too_little_memory_names_the_tokens():
    said = "a batch of 512 tokens does not fit into memory; try batch_tokens=256"
    with pytest.raises(TrainError, match=said), memory_guard(32, 512):
        raise RuntimeError("CUDA out of memory")


def uneven(count, start=0):
    """Texts of 1 to 15 words."""
    rows = h.rows(count, start)
    return [{**row, "text": " ".join([*row["text"].split()[3:4] * (1 + i * 7 % 15)])} for i, row in enumerate(rows)]


BUDGETED = {"epochs": 3, "batch_tokens": 40, "progress": False, "checkpoint_steps": 2}


def trained(task, out=None, **options):
    return sm.fit(h.bert(0.2), "LN()", task, tokenizer=h.tokenizer(), out=out, **{**BUDGETED, **options})


@pytest.fixture
def small_pools(monkeypatch):
    """Pools of two batches, so that epochs differ in length on little data too."""
    monkeypatch.setattr("smidgen.data.batching.POOL", 2)


class StopError(Exception):
    pass


def stop_at(monkeypatch, call):
    """The n-th step is not made."""
    left, original = [call], Loop._step

    def step(self, batch, *args):
        left[0] -= 1
        if left[0] == 0:
            monkeypatch.setattr(Loop, "_step", original)
            raise StopError
        return original(self, batch, *args)

    monkeypatch.setattr(Loop, "_step", step)


def fed(monkeypatch):
    """What every step is fed, as lists."""
    seen, original = [], Loop._step

    def step(self, places, batch):
        seen.append(batch["input_ids"].tolist())
        return original(self, places, batch)

    monkeypatch.setattr(Loop, "_step", step)
    return seen


def stopped_and_resumed(task, out, stop, monkeypatch):
    """Steps done before, what is fed after, and the delta of a run that is stopped before a step and goes on."""
    stop_at(monkeypatch, stop)
    with pytest.raises(StopError):
        trained(task, out)
    state = RunFolder(out, writer=False).resume()
    with monkeypatch.context() as patch:
        rest = fed(patch)
        delta = trained(task, out)
    return state.progress.step if state else 0, rest, delta


def whole_run(task, monkeypatch, out=None):
    with monkeypatch.context() as patch:
        batches = fed(patch)
        delta = trained(task, out)
    return batches, delta


def test_budgeted_runs_resume_at_any_step(tmp_path, monkeypatch, small_pools):
    task = h.task(tmp_path / "task", make=uneven)
    batches, whole = whole_run(task, monkeypatch, tmp_path / "whole")
    assert whole.info["steps"] == len(batches)
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["chosen"]["steps"] == len(batches)
    assert all(len(batch) * len(batch[0]) <= 40 for batch in batches)
    for stop in range(2, len(batches) + 1, 6):
        done, rest, resumed = stopped_and_resumed(task, tmp_path / f"run-{stop}", stop, monkeypatch)
        assert rest == batches[done:]
        h.same(resumed, whole)


def test_an_offset_of_equal_epochs_would_be_seen(tmp_path, monkeypatch, small_pools):
    task = h.task(tmp_path / "task", make=uneven)
    batches, _ = whole_run(task, monkeypatch)
    settings = Settings(epochs=BUDGETED["epochs"], batch_tokens=BUDGETED["batch_tokens"])
    rows = task.encode(h.tokenizer(), "train")
    feed = Feed(rows, task.collator(h.tokenizer()), settings, 0, 1, torch.device("cpu"))
    first, both = feed.before(1), feed.before(2)
    assert both != 2 * first
    monkeypatch.setattr(Feed, "before", lambda self, epoch: epoch * first)
    done, rest, _ = stopped_and_resumed(task, tmp_path / "run", both + 4, monkeypatch)
    assert rest != batches[done:]


def test_the_sum_of_rates_knows_how_long_epochs_were(tmp_path, small_pools):
    """`lr_steps` reads the step of the best epoch, not a share of all steps."""
    delta = trained(h.task(tmp_path / "task", make=uneven), lr=1e-2)
    settings = Settings(**{key: delta.info["settings"][key] for key in asdict(Settings())})
    rates = [1e-2 * settings.rate(step, delta.info["steps"]) for step in range(delta.info["steps"])]
    assert lr_steps(delta) == pytest.approx(sum(rates[: delta.info["best_step"]]))
    assert lr_steps(delta.with_info(best_step=1)) == pytest.approx(rates[0])
