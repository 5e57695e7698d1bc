"""An objective says what it needs: references, other batches, how examples add up. Its identity is its fields."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import DataError, DeltaError, SmidgenError, TrainError
from smidgen.data.kinds.base import kind_named
from smidgen.delta.content_hash import content_digest
from smidgen.ports.attachment_record import trained_parameters
from smidgen.ports.in_place.shared_parameters import shared_copy
from smidgen.steps.loss_computation import At, Beside, loss_of
from smidgen.steps.micro_batches import split_batch
from smidgen.steps.objectives import Needs, Objective, TaskLoss, reduction_of
from smidgen.steps.other_batches import OtherBatches, Source
from smidgen.steps.references import reference_models
from smidgen.steps.step import BASE, START, Batches
from smidgen.testing.cases import shake
from tests import helpers as h

ROOT = Path(__file__).parents[1]
QUICK = {"epochs": 1, "batch_size": 8, "progress": False, "max_length": 16}


@pytest.fixture
def task(tmp_path):
    return h.task(tmp_path / "data")


def fit(task, objective=None, model=None, recipe="LN()", **options):
    options = {**QUICK, "tokenizer": h.tokenizer(), **options}
    return sm.fit(model or h.bert(), recipe, task, objective=objective, **options)


def trained(recipe="LN()", seed=1, model=None, **options):
    model = model or h.bert()
    sm.attach(model, recipe, **options)
    shake(trained_parameters(model).values(), 0.3, seed)
    return sm.detach(model)


# References


@dataclass(frozen=True)
class Compares(Objective):
    """Leaves what each reference gave in `seen`."""

    references: dict
    seen: list = field(default_factory=list, repr=False)

    def needs(self, kind):
        return Needs(references=self.references)

    def loss(self, step):
        inputs = {k: v for k, v in step.batch.items() if k != "labels"}
        found = {name: step.reference(name) for name in self.references}
        assert all(step.reference(name) is found[name] for name in found), "run once"
        assert not any(outputs.logits.requires_grad for outputs in found.values())
        self.seen.append((inputs, {name: outputs.logits for name, outputs in found.items()}))
        return step.outputs().loss


def test_a_reference_is_what_it_is_called(task):
    """The base, another delta on it, the model as the run began, and another model; with dropout in the tuned one."""
    delta, teacher = trained("LoRA(rank=2) + LN()", model=h.bert(0.3)), h.bert(seed=5)
    start = trained("LN()", seed=9, model=h.bert(0.3))
    wanted = {"base": BASE, "other": delta, "start": START, "teacher": teacher}
    model, objective = h.bert(0.3), Compares(wanted)
    with h.untouched(model), h.untouched(teacher):
        fit(task, objective, model, start=start, lr=1e-2)
    assert len(objective.seen) > 2
    for inputs, found in (objective.seen[1], objective.seen[-1]):
        torch.testing.assert_close(found["base"], h.logits(model, **inputs))
        torch.testing.assert_close(found["teacher"], h.logits(teacher, **inputs))
        for name, put in (("other", delta), ("start", start)):
            with sm.attached(model, put):
                torch.testing.assert_close(found[name], h.logits(model, **inputs), msg=name)


def test_a_reference_takes_no_memory_for_the_base():
    model = sm.attach(h.bert(), "LN()")
    twin = shared_copy(model)
    masters = {id(p) for p in trained_parameters(model).values()}
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert one is not other
        assert (one.data_ptr() == other.data_ptr()) == (id(one) not in masters), name
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    reference_models(model, {"a": trained("LoRA(rank=2)"), "b": START})
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_a_reference_of_another_base_or_type_is_refused(task):
    with pytest.raises(DeltaError, match="other values"):
        fit(task, Compares({"other": trained(model=h.bert(seed=3))}))
    with pytest.raises(TrainError, match=r"the reference 'x' is 'teacher'; it is 'base', 'start', a Delta, or another"):
        fit(task, Compares({"x": "teacher"}))


# Other batches


@dataclass(frozen=True)
class Beside2(Objective):
    """The task's loss less that of other rows."""

    other: Batches
    weight: float = 0.5
    seen: list = field(default_factory=list, repr=False)

    def needs(self, kind):
        return Needs(batches={"other": self.other})

    def loss(self, step):
        self.seen.append({name: batch["input_ids"] for name, batch in step.batches.items()})
        return step.outputs().loss + self.weight * step.outputs("other").loss


def test_other_batches_are_told_by_seed_and_step(tmp_path, task):
    kept = h.task(tmp_path / "kept", 10)
    model, source = h.bert(), Source(3, 4, 16, torch.device("cpu"))
    feed = OtherBatches.of(Batches(kept), task, h.tokenizer(), model, source)
    assert [len(feed.at(i)["input_ids"]) for i in range(6)] == [4, 4, 2, 4, 4, 2]
    rows = [tuple(row.tolist()) for i in range(3) for row in feed.at(i)["labels"][:, None]]
    assert len(rows) == 10
    assert torch.equal(feed.at(4)["input_ids"], feed.at(4)["input_ids"])
    epochs = [torch.cat([feed.at(3 * e + i)["labels"] for i in range(3)]) for e in (0, 1)]
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist())
    bare = OtherBatches.of(Batches(kept, batch_size=3, labelled=False), task, h.tokenizer(), model, source).at(0)
    assert "labels" not in bare
    assert len(bare["input_ids"]) == 3


def test_the_gradient_of_two_batches_is_that_of_both(tmp_path, task):
    kept = h.task(tmp_path / "kept", 10)
    model = sm.attach(h.bert(), "LN()")
    source = Source(0, 4, 16, torch.device("cpu"))
    objective = Beside2(Batches(kept), 0.25)
    beside = Beside.of(objective, model, task, h.tokenizer(), source)
    batch = {**h.ids(), "labels": torch.tensor([0, 1, 1])}
    loss_of(model, batch, objective, beside, At(2)).backward()
    found = {n: p.grad.clone() for n, p in trained_parameters(model).items()}
    model.zero_grad()
    (model(**batch).loss + 0.25 * model(**beside.batches["other"].at(2)).loss).backward()
    for name, p in trained_parameters(model).items():
        torch.testing.assert_close(p.grad, found[name], msg=name)


def test_what_other_batches_do_not_go_with_is_refused(tmp_path, task):
    objective = Beside2(Batches(h.task(tmp_path / "kept", 10)))
    need = sm.plan(h.bert(), "LN()", batch_size=2, length=16).costs["peak_bytes"]
    with pytest.raises(TrainError, match="reads other batches, which max_memory does not reckon with"):
        fit(task, objective, max_memory=need)
    for name in ("cache", "only_read"):
        with pytest.raises(TrainError, match=f"{name}=True, but the objective reads other batches"):
            fit(task, objective, recipe="LN(layers='top:1')", epochs=2, **{name: True})
    with pytest.raises(DataError, match="has no retain split"):
        fit(task, Beside2(Batches(split="retain")))
    numbers = h.task(tmp_path / "n", 8, 4, lambda n, start=0: [{"text": "a film", "label": 0.5 + i} for i in range(n)])
    with pytest.raises(TrainError, match="batches are of a regression task, and the run trains on classification"):
        fit(task, Beside2(Batches(numbers)))


def test_rows_of_other_batches_are_not_taken_for_those_of_the_cache(tmp_path, task):
    """Short ways hold for the rows that are trained on; with two batches none is taken, and nothing is wrong."""
    kept = h.task(tmp_path / "kept", 10)
    runs = [tmp_path / "a", tmp_path / "b"]
    options = {"recipe": "LN(layers='top:1')", "epochs": 2}
    one = fit(task, Beside2(Batches(kept)), out=runs[0], **options)
    h.same(one, fit(task, Beside2(Batches(kept)), cache=False, only_read=False, **options))
    fit(task, TaskLoss(), out=runs[1], **options)
    chosen = [json.loads((run / "run.json").read_text())["chosen"]["cache"] for run in runs]
    assert chosen == ["the objective reads other batches than those that states are kept of", "on"]


# How examples add up


@dataclass(frozen=True)
class Summed(TaskLoss):
    reduction = "sum"

    def loss(self, step):
        rows = len(step.batch["labels"])
        return step.outputs().loss * rows


@dataclass(frozen=True)
class Coupled(TaskLoss):
    """The spread of the examples' losses: of a part of a batch, it is another number."""

    reduction = "batch"

    def loss(self, step):
        each = torch.nn.functional.cross_entropy(step.outputs().logits, step.batch["labels"], reduction="none")
        return each.mean() + each.std(correction=0)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_sum_is_not_weighted(size):
    model = sm.attach(h.bert().double(), "LN()")
    batch = {**h.ids(rows=5), "labels": torch.tensor([0, 1, 1, 0, 1])}
    objective, beside = Summed(), Beside(kind_named("classification"))
    whole = loss_of(model, batch, objective, beside)
    parts = split_batch(range(5), batch, size, "classification", reduction_of(objective, beside.kind))
    found = sum(loss_of(model, p.batch, objective, beside, At(weight=p.weight, share=p.share)) for p in parts)
    torch.testing.assert_close(found, whole)
    wrong = split_batch(range(5), batch, size, "classification", "mean")
    assert not torch.allclose(
        sum(loss_of(model, p.batch, objective, beside, At(weight=p.weight)) for p in wrong), whole
    )


def test_a_penalty_counts_once_for_a_batch():
    @dataclass(frozen=True)
    class Drawn(Summed):
        def penalty(self, step):
            return sum(p.square().sum() for p in trained_parameters(step.model).values())

    model = sm.attach(h.bert().double(), "LN()")
    batch = {**h.ids(rows=5), "labels": torch.tensor([0, 1, 1, 0, 1])}
    beside = Beside(kind_named("classification"))
    plain, whole = (loss_of(model, batch, objective, beside) for objective in (Summed(), Drawn()))
    assert whole - plain > 1
    parts = split_batch(range(5), batch, 2, "classification", "sum")
    found = sum(loss_of(model, p.batch, Drawn(), beside, At(weight=p.weight, share=p.share)) for p in parts)
    torch.testing.assert_close(found, whole)


def test_a_loss_that_couples_the_batch_is_never_cut(task):
    room = sm.plan(h.bert(), "LN()", batch_size=8, length=16).costs["peak_bytes"]
    less = sm.plan(h.bert(), "LN()", batch_size=2, length=16).costs["peak_bytes"]
    with pytest.raises(
        TrainError, match=r"Coupled couples the 8 examples of a batch, .* room for [24]; set batch_size="
    ):
        fit(task, Coupled(), max_memory=less)
    h.same(fit(task, Coupled(), max_memory=4 * room, cache=False), fit(task, Coupled(), cache=False))
    batch = {**h.ids(rows=5), "labels": torch.tensor([0, 1, 1, 0, 1])}
    with pytest.raises(TrainError, match="couples the 5 examples"):
        list(split_batch(range(5), batch, 2, "classification", "batch"))


def test_batches_of_tokens_are_not_cut_either(task):
    """They may hold more rows than batch_size."""
    fit(task, Coupled(), batch_size=2, batch_tokens=64)


def test_a_kind_that_couples_its_batch_does_so_whatever_the_objective(task, monkeypatch):
    monkeypatch.setattr(type(task.task_kind), "couples_batch", True)
    assert reduction_of(TaskLoss(), task.task_kind) == "batch"
    less = sm.plan(h.bert(), "LN()", batch_size=2, length=16).costs["peak_bytes"]
    with pytest.raises(TrainError, match="cuts batches, and the loss of a classification task is coupled"):
        fit(task, max_memory=less)


def test_what_is_no_objective_is_one_line(task):
    class Odd(TaskLoss):
        reduction = "median"

    class Vector(TaskLoss):
        def loss(self, step):
            return step.outputs().logits

    class Lost(TaskLoss):
        def loss(self, step):
            return step.outputs("retain").loss

    class Empty(Objective):
        pass

    said = {
        Odd(): "Odd.reduction='median' is not one of mean, sum, batch",
        Vector(): r"Vector gives \(2, 2\), where a loss is one number",
        Lost(): "reads a batch 'retain', but needs.. names train",
        (lambda: 0): "is no smidgen.Objective",
    }
    for objective, words in said.items():
        model = h.bert()
        with h.untouched(model), pytest.raises(TrainError, match=words) as error:
            fit(task, objective, model)
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="Empty does not say how to compute its loss"):
        fit(task, Empty())
    with pytest.raises(TypeError, match=r"First defines __call__, needs_reference; an objective defines loss\(self"):
        type("First", (Objective,), {"needs_reference": True, "__call__": lambda self, *rest: 0})


# Identity


@dataclass(frozen=True)
class Weighted(TaskLoss):
    weight: float = 1.0
    about: object = None
    unseen: list = field(default_factory=list, repr=False)


def test_an_objective_is_told_by_its_fields(task):
    delta = trained()
    one, other = Weighted(0.5, (delta, {"a": [1, task]})), Weighted(0.5, (replace(delta), {"a": [1, task]}), [3])
    assert one.identity == other.identity
    assert delta.digest in one.identity
    assert " at 0x" not in one.identity
    assert Weighted(0.5).identity == "Weighted(weight=0.5, about=None)"
    different = [
        Weighted(0.6),
        Weighted(about=trained(seed=2)),
        Weighted(about=h.bert()),
        Weighted(about=[1]),
        TaskLoss(),
    ]
    assert len({each.identity for each in different}) == len(different)
    assert content_digest(h.bert()) == content_digest(h.bert()) != content_digest(h.bert(seed=1))


def test_what_cannot_be_told_apart_is_refused_where_it_matters(task, tmp_path):
    objective = Weighted(about=lambda x: x)
    fit(task, objective)
    with pytest.raises(TrainError, match=r"Weighted.about holds <function .*no record can tell apart"):
        fit(task, objective, out=tmp_path / "run")

    class Loose(TaskLoss):
        def __init__(self):
            object.__setattr__(self, "weight", 3)

    fit(task, Loose())
    with pytest.raises(TrainError, match="Loose keeps weight beside its fields"):
        fit(task, Loose(), out=tmp_path / "run")


SCRIPT = """
import signal, sys
from dataclasses import dataclass
from pathlib import Path
import smidgen as sm
from tests import helpers as h

@dataclass(frozen=True)
class Mine(sm.Objective):
    reference: sm.Delta
    weight: float
    def needs(self, kind):
        return sm.Needs(references={"other": self.reference})
    def loss(self, step):
        if step.number == int(sys.argv[2]):
            signal.raise_signal(signal.SIGINT)
        gap = step.outputs().logits - step.reference("other").logits
        return step.outputs().loss + self.weight * gap.square().mean()

folder = Path(sys.argv[1])
sm.fit(h.bert(), "LN()", sm.Task.load(folder / "data"), tokenizer=h.tokenizer(), epochs=2, batch_size=8, progress=False,
       objective=Mine(sm.Delta.load(folder / "other"), float(sys.argv[4])), out=folder / sys.argv[3])
"""


def test_a_run_with_an_objective_of_ones_own_goes_on_in_another_process(task, tmp_path):
    trained().save(tmp_path / "other")
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    def run(stop, out, weight=0.5):
        command = [sys.executable, tmp_path / "script.py", tmp_path, str(stop), out, str(weight)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert run(-1, "whole").returncode == 0
    stopped = run(5, "run")
    assert "KeyboardInterrupt" in stopped.stderr
    assert not (tmp_path / "run" / "delta.json").exists()
    other = run(-1, "run", 0.6)
    assert "holds another run: objective was 'Mine(reference=Delta(" in other.stderr.splitlines()[-1]
    assert run(-1, "run").returncode == 0
    h.same(sm.Delta.load(tmp_path / "run"), sm.Delta.load(tmp_path / "whole"))


# fit(start=...)


def test_a_run_goes_on_from_a_delta(task):
    first = fit(task, epochs=2, lr=1e-2)
    model = h.bert()
    with h.untouched(model):
        still = fit(task, model=model, start=first, lr=1e-6, head_lr=1e-6)
        second = fit(task, model=model, start=first, lr=1e-2)
    for name, tensor in first.tensors.items():
        torch.testing.assert_close(still.tensors[name], tensor, atol=1e-5, rtol=1e-4)
    assert any(not torch.allclose(second.tensors[n], t) for n, t in first.tensors.items())
    assert second.info["start"] == first.digest
    assert second.base == first.base


def test_a_start_brings_selection_and_pooling(task):
    first = fit(task, recipe="LN() | Select('magnitude', keep=0.3)", pooling="mean", lr=1e-2)
    second = fit(task, recipe="LN()", start=first, lr=1e-2)
    assert (second.recipe, second.pooling) == (first.recipe, "mean")
    for name, index in first.tensors.items():
        if name.endswith(".indices"):
            assert torch.equal(second.tensors[name], index)


def test_another_start_is_another_run(task, tmp_path):
    one, other = trained(seed=1), trained(seed=2)
    fit(task, start=one, out=tmp_path / "run")
    for start in (other, None):
        with pytest.raises(TrainError, match="holds another run: start was"):
            fit(task, start=start, out=tmp_path / "run")
    fit(task, start=one, out=tmp_path / "run")


def test_a_start_that_does_not_fit_is_one_line(task):
    start = trained()
    grown = trained("TriAdaptLoRA(rank=4, growth=1)")
    picked = sm.select(h.bert(), "LN() | Select('magnitude', keep=0.3)")
    part = trained(picked.recipe, selection=picked)
    cases = [
        ({"recipe": "LoRA(rank=2)", "start": start}, r"start was trained with LN\(\), so recipe=LoRA\(rank=2\) cannot"),
        ({"start": start, "pooling": "mean"}, "start was trained with pooling=None; leave pooling='mean' out"),
        ({"recipe": str(grown.recipe), "start": grown}, "grows by a schedule that a delta does not hold"),
        ({"recipe": picked.recipe, "start": part, "selection": picked}, "its own selection"),
        ({"start": replace(start, labels=("a", "b"))}, "start was trained on a, b"),
    ]
    for options, said in cases:
        model = h.bert()
        with h.untouched(model), pytest.raises(SmidgenError, match=said) as error:
            fit(task, model=model, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(DeltaError, match="other values"):
        fit(task, start=start, model=h.bert(seed=4))


# Without a validation split


def test_without_a_validation_split_the_last_state_is_kept_and_that_is_said(tmp_path):
    alone = sm.Task.load(h.jsonl(tmp_path / "train.jsonl", h.rows(32)), validation=0)
    assert "validation" not in alone.splits
    with pytest.warns(UserWarning, match="validation split of train is missing: the state after the last"):
        delta = fit(alone, epochs=2, out=tmp_path / "run", lr=1e-2)
    assert delta.info["scores"] == {}
    assert (delta.info["best_epoch"], delta.info["best_step"]) == (2, 8)
    with pytest.warns(UserWarning, match="the last epoch"):
        h.same(fit(alone, epochs=2, lr=1e-2), delta)
