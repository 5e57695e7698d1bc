"""Two runs with one folder: the second is told so in one line, and what a killed one leaves holds nobody up."""

from __future__ import annotations

import re
import signal

import pytest

import smidgen as sm
from smidgen.common import folder_lock as locks
from smidgen.common.errors import DeltaError, TrainError
from smidgen.common.folder_lock import NAME, folder_lock_held
from smidgen.steps.objectives import TaskLoss
from tests import helpers as h
from tests.test_bad_input import refused, shell

HOLD = """
import sys, time
from smidgen.common.folder_lock import folder_lock_held

with folder_lock_held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""
IN_USE = ("in use", "wait for its end", "choose another --out")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, data, and a finished run."""
    root = tmp_path_factory.mktemp("world")
    h.build("bert", "AutoModel").save_pretrained(root / "base")
    h.tokenizer().save_pretrained(root / "base")
    h.task(root / "films")
    assert shell(*tune(root, root / "run"))[0] == 0
    return root


def tune(root, out, name="tune"):
    return [name, "--model", root / "base", "--data", root / "films", "--out", out, "--epochs", 1]


def analyze(name, root, out):
    return ["analyze", name, "--model", root / "base", "--data", root / "films", "--out", out]


COMMANDS = {
    "tune": tune,
    "search": lambda root, out: [*tune(root, out, "search"), "--lr", 0.001],
    "merge": lambda root, out: ["merge", "--delta", root / "run", "--out", out],
    "convert": lambda root, out: ["convert", root / "run", out, "--to", "peft"],
    "select": lambda root, out: analyze("select", root, out),
    "fisher": lambda root, out: analyze("fisher", root, out),
    "changes": lambda root, out: [*analyze("changes", root, out), "--epochs", 1, "--seeds", 1],
    "transfer": lambda root, out: analyze("transfer", root, out),
    "trust": lambda root, out: analyze("trust", root, out),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_second_is_one_line(name, world, tmp_path):
    out = tmp_path / "out"
    with folder_lock_held(out):
        refused(*COMMANDS[name](world, out), words=(str(out), *IN_USE))
        assert [path.name for path in out.iterdir()] == [NAME]


@pytest.mark.parametrize("name", ["tune", "search"])
def test_a_killed_process_holds_nobody_up(name, world, tmp_path):
    out = tmp_path / "out"
    process = h.script(tmp_path / "hold.py", HOLD, out)
    assert process.stdout.readline() == "held\n"
    refused(*COMMANDS[name](world, out), words=IN_USE)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (out / NAME).exists()
    code, _, errors = shell(*COMMANDS[name](world, out))
    assert (code, errors) == (0, [])
    assert not (out / NAME).exists()


def test_of_two_at_once_one_finishes_and_the_other_does_not_touch_it(world, tmp_path):
    """The second comes in the middle of the first, at its first line of metrics.jsonl."""
    task, out, seen = sm.Task.load(world / "films"), tmp_path / "out", []

    class Second(TaskLoss):
        def loss(self, step):
            if not seen:
                seen.append(0)
                with pytest.raises(TrainError, match="in use"):
                    run()
                seen.append(1)
            return super().loss(step)

    def run():
        return sm.fit(h.bert(), "LN()", task, out=out, epochs=1, tokenizer=h.tokenizer(), objective=Second())

    delta = run()
    assert seen == [0, 1]
    h.same(sm.Delta.load(out), delta)


def test_a_finished_run_is_read_beside_a_lock(world):
    with folder_lock_held(world / "run"):
        code, out, errors = shell(*tune(world, world / "run"))
    assert (code, errors) == (0, [])
    assert "already finished" in out


def test_nothing_is_left_of_a_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), folder_lock_held(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / NAME).exists()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    with (
        folder_lock_held(tmp_path / "kept"),
        pytest.raises(TrainError, match="in use"),
        folder_lock_held(tmp_path / "kept"),
    ):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]
    with folder_lock_held(None), folder_lock_held(None):
        pass


def test_where_no_lock_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match=r"file is a file, not a folder"), folder_lock_held(tmp_path / "file"):
        pass
    with (
        pytest.raises((TrainError, DeltaError), match=re.escape(str(tmp_path / "file"))),
        folder_lock_held(tmp_path / "file/a"),
    ):
        pass
