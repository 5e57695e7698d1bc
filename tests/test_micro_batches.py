"""Micro-batches: the same gradient in less memory, for every kind of task."""

import json

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import TrainError
from smidgen.common.memory import give_back_memory
from smidgen.steps.micro_batches import split_batch
from tests import helpers as h

OPTIONS = {"epochs": 2, "batch_size": 8, "progress": False, "max_length": 16, "lr": 1e-2}


def fitted(task, model=None, recipe="LN()", **more):
    return sm.fit(model or h.bert(), recipe, task, tokenizer=h.tokenizer(), **{**OPTIONS, **more})


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def labelled(kind):
    """A model and a batch of five rows whose labels are spread unevenly."""
    batch = h.ids(rows=5, length=7)
    if kind == "classification":
        return h.bert(), {**batch, "labels": torch.tensor([0, 1, 1, 0, 1])}
    labels = torch.where(torch.arange(7)[None] < torch.tensor([7, 1, 4, 2, 6])[:, None], batch["input_ids"], -100)
    if kind == "causal-lm":
        return h.causal(), {**batch, "labels": labels}
    return h.build("bert", "AutoModelForTokenClassification"), {**batch, "labels": labels.clamp(max=1)}


@pytest.mark.parametrize("kind", ["classification", "tokens", "causal-lm"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(kind, size):
    model, batch = labelled(kind)
    model = model.double()
    whole = gradient(model, model(**batch).loss)
    found = list(split_batch([3, 1, 4, 0, 2], {**batch, "use_cache": False}, size, kind))
    model.zero_grad()
    total = sum(model(**piece.batch).loss * piece.weight for piece in found)
    torch.testing.assert_close(gradient(model, total), whole, rtol=1e-9, atol=1e-12)
    rows = [place for places, *_ in found for place in places]
    assert rows == [place for place in [3, 1, 4, 0, 2] if place in rows]
    assert len(rows) == 5 or kind == "causal-lm"  # a row whose only label stands first has nothing to predict
    assert sum(piece.weight for piece in found) == pytest.approx(1)
    assert [piece.share for piece in found] == [piece.weight for piece in found]


def test_a_plain_mean_over_pieces_would_be_wrong():
    model, batch = labelled("causal-lm")
    model = model.double()
    whole = gradient(model, model(**batch).loss)
    found = list(split_batch(range(5), batch, 2, "causal-lm"))
    wrong = gradient(model, sum(model(**piece.batch).loss for piece in found) / len(found))
    assert not torch.allclose(wrong, whole, rtol=1e-3)


def test_a_piece_without_labels_is_left_out():
    model, batch = labelled("tokens")
    batch["labels"][2:4] = -100
    found = list(split_batch(range(5), batch, 2, "tokens"))
    assert [list(places) for places, *_ in found] == [[0, 1], [4]]
    assert all(torch.isfinite(model(**piece.batch).loss) for piece in found)


@pytest.mark.parametrize("recipe", ["LN()", "LN(layers='top:1')"])
def test_fit_in_pieces_gives_the_same_delta(tmp_path, recipe):
    task = h.task(tmp_path / "data")
    need = sm.plan(h.bert(), recipe, batch_size=2, length=16).costs["peak_bytes"]
    whole = fitted(task, recipe=recipe)
    part = fitted(task, recipe=recipe, max_memory=need, out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["chosen"]["rows_at_once"] in (2, 4)
    for name, tensor in part.tensors.items():
        torch.testing.assert_close(tensor, whole.tensors[name], rtol=1e-4, atol=1e-5)


def test_too_little_for_one_example_is_one_line(tmp_path):
    model = h.bert()
    with h.untouched(model), pytest.raises(TrainError, match="one example of .* tokens needs .* bytes") as error:
        fitted(h.task(tmp_path), model, max_memory="2KB")
    assert "\n" not in str(error.value)
    with pytest.raises(TrainError, match="'plenty' is no size of memory"):
        fitted(h.task(tmp_path / "again"), max_memory="plenty")


def test_recompute_gives_the_same_delta_bit_for_bit(tmp_path):
    task = h.task(tmp_path)
    plain = fitted(task, h.bert(dropout=0.2), only_read=False, fast_dropout=False)
    twice = fitted(task, h.bert(dropout=0.2), recompute=True)  # draws as torch does
    assert all(torch.equal(plain.tensors[name], twice.tensors[name]) for name in plain.tensors)


def test_recompute_leaves_the_model_as_it_was(tmp_path):
    model = h.bert()
    with h.untouched(model):
        fitted(h.task(tmp_path), model, recompute=True)


def test_memory_is_given_back_where_glibc_is():
    assert give_back_memory() in (True, False)
