"""A run that is killed or interrupted at any moment and started again ends with the same bits."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass, field

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import TrainError
from smidgen.steps.objectives import TaskLoss
from smidgen.steps.optimizer_groups import HEAD_LR
from smidgen.training.run.progress import Choices, Progress, State
from smidgen.training.run.run_folder import CHECKPOINT, METRICS, RUN, RunFolder
from tests import helpers as h

RECIPE = "LN() + LoRA(rank=2, dropout=0.1)"
SETTINGS = {"epochs": 3, "batch_size": 8, "lr": 1e-2, "checkpoint_steps": 2, "progress": False}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return h.task(tmp_path_factory.mktemp("task"), train=40)


def train(task, out=None, dropout=0.2, recipe=RECIPE, **options):
    torch.rand(3)  # wherever the global generator stands
    return sm.fit(h.bert(dropout), recipe, task, tokenizer=h.tokenizer(), out=out, **{**SETTINGS, **options})


def lines(out):
    """What metrics.jsonl says."""
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def without_rate(out):
    return [{key: value for key, value in line.items() if key != "rate"} for line in lines(out)]


KILLED = """
import json, os, random, signal, sys, time, traceback
from pathlib import Path
import torch
import helpers as h
import smidgen as sm
from smidgen.data import Task
from smidgen.training.run.run_folder import CHECKPOINT

torch.set_num_threads(1)
root, fit = Path(sys.argv[1]), sm.fit
task = Task.load(root / "task")
settings = {"epochs": 4, "batch_size": 4, "lr": 1e-2, "checkpoint_steps": 3, "progress": False}

def start(out):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        fit(h.bert(0.2), "LN() + LoRA(rank=2, dropout=0.1)", task, tokenizer=h.tokenizer(), out=out, **settings)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)

def stamp(out):
    path = out / CHECKPOINT
    return path.stat().st_mtime_ns if path.exists() else 0

assert os.waitpid(start(root / "whole"), 0)[1] == 0
chance, codes = random.Random(0), []
for kill in range(7):
    before, pid = stamp(root / "killed"), start(root / "killed")
    while stamp(root / "killed") == before and (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.1))
    if done == (0, 0):
        os.kill(pid, signal.SIGKILL)
        done = os.waitpid(pid, 0)
    codes.append(done[1])
    if done[1] != signal.SIGKILL:
        break
else:
    codes.append(os.waitpid(start(root / "killed"), 0)[1])
print(json.dumps(codes))
"""


def test_killed_at_random_moments_and_started_again(tmp_path):
    h.task(tmp_path / "task", train=48)
    process = h.script(tmp_path / "killed.py", KILLED, tmp_path)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    codes = json.loads(said.splitlines()[-1])
    assert codes[-1] == 0, said
    assert codes.count(signal.SIGKILL) >= 3, f"the run was over too soon: {codes}"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    h.same(sm.Delta.load(killed), sm.Delta.load(whole))
    assert sm.Delta.load(killed).to_json() == sm.Delta.load(whole).to_json()
    assert without_rate(killed) == without_rate(whole)
    steps = [line["step"] for line in lines(killed) if "loss" in line]
    assert steps == [10, 20, 30, 40, 48]
    assert not (killed / CHECKPOINT).exists()
    assert not list(killed.glob(".part-*")), "a killed write left its file"


@dataclass(frozen=True)
class Interrupted(TaskLoss):
    """The task's loss; sends this process a signal in its n-th call."""

    at: list = field(default_factory=list, repr=False)

    def loss(self, step):
        if self.at:
            self.at[0] -= 1
            if self.at[0] == 0:
                signal.raise_signal(signal.SIGINT)
        return super().loss(step)


@pytest.mark.parametrize("call", [2, 4, 6, 11])
def test_interrupted_in_a_step(call, task, tmp_path):
    whole = train(task, objective=Interrupted())
    with pytest.raises(KeyboardInterrupt):
        train(task, tmp_path / "run", objective=Interrupted([call]))
    assert (tmp_path / "run" / CHECKPOINT).is_file()
    h.same(train(task, tmp_path / "run", objective=Interrupted()), whole)


@pytest.mark.parametrize("call", [4, 9, 14])
def test_interrupted_where_tensors_grow(call, task, tmp_path):
    grows = {"recipe": "TriAdaptLoRA(rank=4, growth=1, orthogonality=0.5) + LN()"}
    whole = train(task, objective=Interrupted(), **grows)
    assert any(len(t) > 1 for name, t in whole.tensors.items() if name.endswith(".A")), "nothing grew"
    with pytest.raises(KeyboardInterrupt):
        train(task, tmp_path / "run", objective=Interrupted([call]), **grows)
    h.same(train(task, tmp_path / "run", objective=Interrupted(), **grows), whole)


@pytest.mark.parametrize("validation", [1, 3])
def test_interrupted_in_a_validation(validation, task, tmp_path, monkeypatch):
    whole = train(task)
    loop, calls = sys.modules["smidgen.training.run.loop"], []
    original = loop.run_examples

    def run(*args):
        calls.append(1)
        if len(calls) == validation:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(loop, "run_examples", run)
    with pytest.raises(KeyboardInterrupt):
        train(task, tmp_path / "run")
    resumed = train(task, tmp_path / "run")
    h.same(resumed, whole)
    assert resumed.info == whole.info


def test_an_error_in_the_middle_leaves_the_last_checkpoint(task, tmp_path):
    @dataclass(frozen=True)
    class Broken(Interrupted):
        def loss(self, step):
            loss = super(Interrupted, self).loss(step)
            self.at[0] -= 1
            if self.at[0] == 0:
                raise OSError("gone")
            return loss

        def __repr__(self):
            return "Broken()"

    whole, model = train(task, objective=Broken([-1])), h.bert(0.2)
    with h.untouched(model), pytest.raises(OSError, match="gone"):
        sm.fit(model, RECIPE, task, tokenizer=h.tokenizer(), objective=Broken([9]), out=tmp_path / "run", **SETTINGS)
    h.same(train(task, tmp_path / "run", objective=Broken([-1])), whole)


def test_a_checkpoint_holds_what_the_next_step_needs(task, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(task, tmp_path / "run", objective=Interrupted([8]))
    state = RunFolder(tmp_path / "run").resume()
    kinds = {name.split("/")[0] for name in state.tensors}
    assert kinds == {"trained", "best", "optimizer", "rng"}
    assert state.progress.step in (6, 7)
    assert state.progress.best_epoch == 1


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "no metadata"])
def test_a_damaged_checkpoint(damage, task, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(task, tmp_path / "run", objective=Interrupted([8]))
    path = tmp_path / "run" / CHECKPOINT
    if damage == "no metadata":
        from safetensors.torch import save_file

        save_file({"trained/x": torch.zeros(1)}, path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"garbage": b"\x07" * 200, "truncated": whole[: len(whole) // 2], "empty": b""}[damage])
    model = h.bert(0.2)
    with h.untouched(model), pytest.raises(TrainError, match=rf"{CHECKPOINT} is damaged.*remove it to start over"):
        sm.fit(model, RECIPE, task, tokenizer=h.tokenizer(), objective=Interrupted(), out=tmp_path / "run", **SETTINGS)
    path.unlink()
    h.same(train(task, tmp_path / "run", objective=Interrupted()), train(task, objective=Interrupted()))
    steps = [line["step"] for line in lines(tmp_path / "run") if "loss" in line]
    assert steps == sorted(set(steps))


def test_killed_before_the_first_checkpoint(task, tmp_path):
    out = tmp_path / "run"
    whole = train(task, out, checkpoint_steps=100)
    before = without_rate(out)
    assert [line["step"] for line in before] == [5, 10, 10, 15, 15]
    for name in ("delta.json", "delta.safetensors", "README.md"):
        (out / name).unlink()
    (out / METRICS).write_text((out / METRICS).read_text()[:150])  # as if killed in the middle of a line
    h.same(train(task, out, checkpoint_steps=100), whole)
    assert without_rate(out) == before


def test_killed_between_run_json_and_metrics(task, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(task, out, objective=Interrupted([1]))
    assert not (out / CHECKPOINT).exists(), "interrupted in the dry run: nothing to keep"
    (out / METRICS).unlink()
    h.same(train(task, out, objective=Interrupted()), train(task, objective=Interrupted()))


def test_after_the_end_the_same_call_gives_the_saved_delta(task, tmp_path, monkeypatch):
    first = train(task, tmp_path / "run")
    monkeypatch.setattr(sys.modules["smidgen.training.run.loop"].Loop, "_train", None)
    model = h.bert(0.2)
    with h.untouched(model):
        again = sm.fit(model, RECIPE, task, tokenizer=h.tokenizer(), out=tmp_path / "run", **SETTINGS)
    h.same(again, first)
    assert again.info["scores"] == first.info["scores"]


def test_killed_between_the_delta_and_the_cleaning_up(task, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", lambda self: None)  # the process was killed before
        first = train(task, out)
    assert (out / CHECKPOINT).exists()
    h.same(train(task, out), first)
    assert not (out / CHECKPOINT).exists()


def test_what_was_chosen_is_recorded_and_used_again(task, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(task, tmp_path / "run", objective=Interrupted([8]), max_length=None)
    record = json.loads((tmp_path / "run" / RUN).read_text())
    assert record["chosen"]["max_length"] == 32
    assert record["chosen"]["steps"] == 15
    assert record["chosen"]["lr"] == {"LN()": 1e-2, "LoRA(rank=2, dropout=0.1)": 1e-2, "head": HEAD_LR}
    assert record["asked"]["settings"]["max_length"] is None
    record["chosen"]["max_length"] = 5
    (tmp_path / "run" / RUN).write_text(json.dumps(record))
    resumed = train(task, tmp_path / "run", objective=Interrupted())
    assert resumed.info["settings"]["max_length"] == 5


def interrupted(task, folder, **chosen):
    """A run stopped at step 8, with some of its recorded choices changed."""
    with pytest.raises(KeyboardInterrupt):
        train(task, folder, objective=Interrupted([8]))
    record = json.loads((folder / RUN).read_text())
    record["chosen"].update(chosen)
    (folder / RUN).write_text(json.dumps(record))


def test_recorded_rates_are_used_again(task, tmp_path):
    interrupted(task, tmp_path / "a")
    rates = json.loads((tmp_path / "a" / RUN).read_text())["chosen"]["lr"]
    interrupted(task, tmp_path / "b", lr={name: rate / 100 for name, rate in rates.items()})
    one, other = (train(task, tmp_path / name, objective=Interrupted()) for name in "ab")
    assert any(not torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_other_processes_are_refused_and_other_threads_are_said(task, tmp_path):
    interrupted(task, tmp_path / "a", processes=4)
    with pytest.raises(TrainError, match="was begun with 4 process"):
        train(task, tmp_path / "a", objective=Interrupted())
    interrupted(task, tmp_path / "b", threads=64)
    with pytest.warns(UserWarning, match="threads was 64, now .*not bit for bit"):
        train(task, tmp_path / "b", objective=Interrupted())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 2e-2}, "lr of settings"),
        ({"seed": 1}, "seed of settings"),
        ({"recipe": "LN()"}, "recipe"),
        ({"objective": sm.StayClose(0.5)}, "objective"),
        ({"dropout": 0.2, "model": 1}, "base"),
        ({"task": 1}, "data"),
    ],
)
def test_another_run_in_the_folder(change, named, task, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(task, tmp_path / "run", objective=Interrupted([8]))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    options = {"objective": Interrupted(), **SETTINGS, **change}
    model = h.bert(0.2, seed=options.pop("model", 0))
    options.pop("dropout", None)
    recipe = options.pop("recipe", RECIPE)
    other = h.task(tmp_path / task.name, train=24) if options.pop("task", None) else task
    with pytest.raises(TrainError, match=rf"holds another run: {named} was .*choose another --out") as error:
        sm.fit(model, recipe, other, tokenizer=h.tokenizer(), out=tmp_path / "run", **options)
    assert len(str(error.value)) < 400
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_folder_of_something_else(task, tmp_path):
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(TrainError, match="not empty and holds no run"):
        train(task, tmp_path)
    with pytest.raises(TrainError, match="is a file"):
        train(task, tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "do not touch"


CHOSEN = Choices(8, 0, 1, {}, 10, 1, 2, "2")


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.start({"a": 1}, CHOSEN)
    folder.log({"step": 1})
    folder.checkpoint(State({"x": torch.ones(1)}, Progress(step=1)))
    folder.log({"step": 2})
    with open(tmp_path / "run" / METRICS, "a") as file:
        file.write('{"torn')
    state = RunFolder(tmp_path / "run").resume()
    assert lines(tmp_path / "run") == [{"step": 1}]
    assert state.progress == Progress(step=1)
    torch.testing.assert_close(state.tensors["x"], torch.ones(1))


def test_only_the_main_process_writes(tmp_path):
    folder = RunFolder(tmp_path / "run", writer=False)
    folder.start({}, CHOSEN)
    folder.log({"step": 1})
    folder.checkpoint(State({}))
    folder.finish()
    assert not (tmp_path / "run").exists()
