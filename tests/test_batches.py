"""Batches of like length: every row once, little padding, and an order that is still random."""

import random

import pytest

import smidgen as sm
from smidgen.batches import POOL, ShuffledBatches
from smidgen.errors import TrainError
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
        assert {row for share in shares for row in share[index]} == set(batch)
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
