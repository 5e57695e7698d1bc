"""Probe: an objective with a retain batch, a delta as reference, a loss over the batch; without a line in src/."""

import ast
from pathlib import Path

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import TrainError
from smidgen.ports.attachment_record import trained_parameters
from smidgen.testing.cases import shake
from tests import helpers as h
from tests.probes.own_objective import KeepAnswers

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src" / "smidgen"
QUICK = {"epochs": 12, "batch_size": 8, "progress": False, "max_length": 16, "lr": 1e-2}


@pytest.fixture
def parts(tmp_path):
    """A task, rows to keep, and an earlier delta."""
    model = h.bert()
    sm.attach(model, "LoRA(rank=2)")
    shake(trained_parameters(model).values(), 0.3)
    return h.task(tmp_path / "new"), h.task(tmp_path / "kept", 20), sm.detach(model)


def distance(delta, kept, teacher):
    """Mean KL of the answers on rows to keep, in a plain loop."""
    model = h.bert()
    rows, collate = kept.encode(h.tokenizer(), "train"), kept.collator(h.tokenizer())
    found = []
    for row in rows:
        batch = {k: v for k, v in collate([row]).items() if k != "labels"}
        p, q = (
            (sm.attach(model, d), h.logits(model, **batch).softmax(-1)[0], sm.detach(model))[1]
            for d in (teacher, delta)
        )
        found.append(sum(float(a) * (float(a.log()) - float(b.log())) for a, b in zip(p, q, strict=True)))
    return sum(found) / len(found)


@pytest.mark.filterwarnings("ignore:the validation split of new is missing")
def test_it_trains_resumes_and_does_what_it_says(parts, tmp_path):
    task, kept, teacher = parts
    task = sm.Task(**{**vars(task), "splits": {"train": task.splits["train"]}})  # the last epoch is what counts
    deltas = {}
    for weight in (0.0, 20.0):
        model = h.bert()
        with h.untouched(model):
            deltas[weight] = sm.fit(
                model, "LN()", task, objective=KeepAnswers(kept, teacher, weight), tokenizer=h.tokenizer(),
                out=tmp_path / str(weight), **QUICK,
            )  # fmt: skip
    far, near = (distance(deltas[weight], kept, teacher) for weight in (0.0, 20.0))
    assert near < 0.5 * far, (near, far)

    class Stops(sm.Callback):
        def on_step(self, run):
            if run.step == 5:
                raise KeyboardInterrupt

    again = {
        "objective": KeepAnswers(kept, teacher, 20.0),
        "tokenizer": h.tokenizer(),
        "out": tmp_path / "run",
        **QUICK,
    }
    with pytest.raises(KeyboardInterrupt):
        sm.fit(h.bert(), "LN()", task, callbacks=[Stops()], checkpoint_steps=2, **again)
    h.same(sm.fit(h.bert(), "LN()", task, checkpoint_steps=2, **again), deltas[20.0])


def test_its_loss_is_the_formula(parts):
    """On one batch of each, in plain loops."""
    from smidgen.steps.loss_computation import At, Beside, loss_of
    from smidgen.steps.other_batches import Source

    task, kept, teacher = parts
    model = sm.attach(h.bert(), "LN()")
    objective = KeepAnswers(kept, teacher, 0.7)
    beside = Beside.of(objective, model, task, h.tokenizer(), Source(0, 4, 16, torch.device("cpu")))
    batch = {**h.ids(), "labels": torch.tensor([0, 1, 1])}
    found = loss_of(model, batch, objective, beside, At(1))
    retain = beside.batches["retain"].at(1)
    assert "labels" not in retain
    tuned, plain = h.logits(model, **retain).double(), float(model(**batch).loss.detach())
    other = sm.attach(h.bert(), teacher)
    wanted = h.logits(other, **retain).double()
    sure = [max(float(v) for v in row.log_softmax(-1)) for row in wanted]
    total = sum(torch.tensor(s).exp().item() for s in sure)
    more = 0.0
    for i, s in enumerate(sure):
        p, q = wanted[i].softmax(-1), tuned[i].softmax(-1)
        more += torch.tensor(s).exp().item() / total * float((p * (p / q).log()).sum())
    assert float(found.detach()) == pytest.approx(plain + 0.7 * more, rel=1e-4)


def test_it_is_refused_where_it_would_be_wrong(parts):
    task, kept, teacher = parts
    options = {**QUICK, "objective": KeepAnswers(kept, teacher), "tokenizer": h.tokenizer()}
    with pytest.raises(TrainError, match=r"KeepAnswers couples the examples of a batch, which max_memory"):
        sm.fit(h.bert(), "LN()", task, max_memory="1GB", **options)


def test_the_library_knows_nothing_of_it():
    """It uses public names, and no file of the library names it or what is its own."""
    tree = ast.parse((HERE / "own_objective.py").read_text())
    imported = {n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)}
    assert imported == {"torch.nn.functional", "smidgen"}
    assert {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)} == {"dataclasses"}
    used = {
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "sm"
    }
    assert used <= set(sm.__all__)
    assert not [path for path in SOURCE.rglob("*.py") if "KeepAnswers" in path.read_text()]
