"""Callbacks are told of a run as it goes; one that fails ends it, saved."""

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import TrainError
from smidgen.ports.attachment_record import trained_parameters
from smidgen.training.run.run_folder import CHECKPOINT
from tests import helpers as h

QUICK = {"epochs": 2, "batch_size": 8, "progress": False, "max_length": 16, "lr": 1e-2}


@pytest.fixture
def task(tmp_path):
    return h.task(tmp_path / "data")


def fit(task, *callbacks, model=None, recipe="LN()", **options):
    options = {**QUICK, "tokenizer": h.tokenizer(), **options}
    return sm.fit(model or h.bert(), recipe, task, callbacks=callbacks, **options)


class Notes(sm.Callback):
    def __init__(self):
        self.said = []

    def on_step(self, run):
        assert run.loss == run.loss
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(run.lr)
        self.said.append(("step", run.step, run.total, run.examples))

    def on_validation(self, run, scores):
        assert run.progress.history[-1].scores == scores.values
        self.said.append(("validation", run.progress.epochs))

    def on_epoch(self, run):
        self.said.append(("epoch", run.progress.epochs))

    def on_round(self, run, delta):
        self.said.append(("round", delta.recipe))


def test_a_callback_is_told_of_everything_in_order(task):
    notes = Notes()
    plain, told = fit(task), fit(task, notes)
    h.same(plain, told)
    steps = [("step", i + 1, 8, 8) for i in range(8)]
    ends = [[("validation", e), ("epoch", e)] for e in (1, 2)]
    assert notes.said == [*steps[:4], *ends[0], *steps[4:], *ends[1], ("round", plain.recipe)]


class Fails(sm.Callback):
    """Raises in the n-th call of one event."""

    def __init__(self, event, at):
        self.left = at
        setattr(self, f"on_{event}", self.fail)

    def fail(self, *about):
        self.left -= 1
        if self.left == 0:
            raise ValueError("no more\nroom")


@pytest.mark.parametrize(
    ("event", "at", "step"), [("step", 3, 3), ("step", 4, 4), ("step", 8, 8), ("validation", 1, 4), ("epoch", 2, 8)]
)
def test_one_that_fails_ends_the_run_which_is_saved_first(event, at, step, task, tmp_path):
    whole, model = fit(task), h.bert()
    said = (
        rf"Fails.on_{event} failed after step {step} \(ValueError: no more\); the run is saved in .*goes on from there"
    )
    with h.untouched(model), pytest.raises(TrainError, match=said) as error:
        fit(task, Fails(event, at), model=model, out=tmp_path / "run", checkpoint_steps=100)
    assert isinstance(error.value.__cause__, ValueError)
    assert "\n" not in str(error.value)
    assert (tmp_path / "run" / CHECKPOINT).is_file()
    notes = Notes()
    h.same(fit(task, notes, model=model, out=tmp_path / "run", checkpoint_steps=100), whole)
    assert [entry[1] for entry in notes.said if entry[0] == "step"] == list(range(step + 1, 9))


def test_one_that_fails_without_a_folder_or_at_the_end(task, tmp_path):
    with pytest.raises(TrainError, match="nothing is saved, as there is no out="):
        fit(task, Fails("step", 2))
    with pytest.raises(TrainError, match=r"on_round failed after step 8 .*; the delta is in "):
        fit(task, Fails("round", 1), out=tmp_path / "run")
    h.same(fit(task, out=tmp_path / "run"), fit(task))


def test_what_a_callback_changes_is_changed(task):
    class Rests(sm.Callback):
        def on_step(self, run):
            with torch.no_grad():
                trained_parameters(run.model)["classifier.bias"].zero_()

    assert not fit(task, Rests()).tensors["classifier.bias"].any()
    assert fit(task).tensors["classifier.bias"].any()


def test_an_interrupt_in_a_callback_is_no_failure(task):
    class Stops(sm.Callback):
        def on_step(self, run):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(task, Stops())


def test_what_is_no_callback_is_one_line(task):
    for wrong, said in ((Notes, r"is no smidgen.Callback; pass Notes\(\)"), (print, "is no smidgen.Callback")):
        model = h.bert()
        with h.untouched(model), pytest.raises(TrainError, match=said):
            fit(task, wrong, model=model)
