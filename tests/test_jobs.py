"""Several trials at once: the same trials, whoever dies."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from datasets import Dataset

from smidgen.common.atomic_files import write_files
from smidgen.common.errors import SmidgenError, TrainError
from smidgen.steps.objectives import TaskLoss
from smidgen.studies.runners import ray_runner
from smidgen.studies.runners.packing import packed, unpacked
from smidgen.studies.search_folder import FILE
from tests import helpers as h
from tests.test_cli import call
from tests.test_search import RATES, TOP, command, results, searched, task, world  # noqa: F401

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Deadly(TaskLoss):
    """Kills the first process of a search that trains with it."""

    marker: str = ""

    def loss(self, step):
        try:
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return super().loss(step)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("recipe", [TOP, "LoRA(rank=2)"])
def test_trials_at_once_are_those_in_turn(task, recipe, tmp_path):  # noqa: F811
    model, options = h.bert(dropout=0.2), {"recipe": recipe, "seeds": (0, 1), "lr": [1e-2, 1e30, 1e-3]}
    told: list[str] = []
    with h.untouched(model):
        found = searched(task, model=model, jobs=2, out=tmp_path / "out", say=told.append, **options)
    wanted = searched(task, **options)
    assert results(found) == results(wanted)
    assert [bool(trial.error) for trial in found.trials] == [False, False, True, True, False, False]
    assert [line.split(":")[0] for line in told] == [f"lr {t.lr:g}, seed {t.seed}" for t in wanted.trials]
    h.same(found.delta, wanted.delta)
    h.same(searched(task, jobs=3, out=tmp_path / "out", **options).delta, wanted.delta)  # finished: only reports


def test_a_killed_process_is_one_line_and_the_search_goes_on(task, tmp_path):  # noqa: F811
    options = {"out": tmp_path / "out", "objective": Deadly(marker=str(tmp_path / "marker"))}
    with pytest.raises(TrainError, match="one of 2 processes of the search was killed") as error:
        searched(task, jobs=2, **options)
    assert "\n" not in str(error.value)
    assert (tmp_path / "out" / FILE).exists()
    found = searched(task, jobs=2, **options)
    assert results(found) == results(searched(task))


def test_what_cannot_be_sent_is_one_line(task, tmp_path):  # noqa: F811
    model = h.bert()
    model.lock = threading.Lock()
    with pytest.raises(TrainError, match=r"jobs=2 sends model.*lock.*use jobs=1") as error:
        searched(task, model=model, jobs=2)
    assert "\n" not in str(error.value)
    for jobs in (0, -1):
        with pytest.raises(TrainError, match="must be at least 1"):
            searched(task, jobs=jobs)


def test_a_mistake_in_a_trial_comes_back_as_it_is(task):  # noqa: F811
    with pytest.raises(SmidgenError, match="pooling") as error:
        searched(task, jobs=2, pooling="middle")
    assert "\n" not in str(error.value)


def test_threads_are_shared(task, tmp_path):  # noqa: F811
    """Each of two processes has half of the threads; read where a loss is computed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        searched(task, jobs=2, objective=Counting(folder=str(tmp_path)))
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)
    seen = [name.name.split("-") for name in tmp_path.iterdir()]
    assert {count for count, _ in seen} == {"2"}
    assert str(os.getpid()) not in {process for _, process in seen}


@dataclass(frozen=True)
class Counting(TaskLoss):
    """Leaves a file named by threads and process."""

    folder: str = ""

    def loss(self, step):
        Path(self.folder, f"{torch.get_num_threads()}-{os.getpid()}").touch()
        return super().loss(step)


SCRIPT = """
from tests import helpers as h
from tests.test_search import searched
from pathlib import Path
import sys
searched(h.task(Path(sys.argv[1]) / "data"), jobs=2, epochs=10000, out=Path(sys.argv[1]) / "out")
"""


def test_a_killed_search_leaves_no_processes(tmp_path):
    """The script has no main guard, as few have."""
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    running = subprocess.Popen([sys.executable, tmp_path / "script.py", tmp_path], env=environment)
    try:
        wait_for(lambda: len(list((tmp_path / "out" / "runs").glob("*/fit/metrics.jsonl"))) == 2)
        children = psutil.Process(running.pid).children(recursive=True)
        assert len(children) >= 2
    finally:
        running.kill()
        running.wait()
    wait_for(lambda: not [child for child in children if child.is_running() and child.status() != "zombie"])


def wait_for(what, seconds=120):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_command_takes_jobs(world):  # noqa: F811
    rates = [word for lr in RATES for word in ("--lr", lr)]
    found = command(world, *rates, "--jobs", 2, "--json", out="at-once").json
    assert [t["lr"] for t in found["trials"]] == RATES
    wrong = command(world, "--jobs", 0, out="never")
    assert wrong.code == 2
    assert "--jobs" in wrong.err


# Where trials run


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--on", "ray"], "--on ray needs a further package: pip install 'smidgen[ray]'"),
        (["--on", "ray://127.0.0.1:10001"], "pip install 'smidgen[ray]'"),
        (["--on", "rai"], "--on rai: local, ray, auto, or the ray:// address of a cluster; did you mean 'ray'?"),
        (["--on", "local://x"], "--on local://x: local, ray, auto,"),
        (["--on", "ray", "--jobs", "2"], "--jobs 2 is for --on local; --on ray makes as many at once as Ray has"),
    ],
)
def test_where_trials_cannot_run_is_one_line(world, tmp_path, monkeypatch, more, said):  # noqa: F811
    monkeypatch.setitem(sys.modules, "ray", None)
    compared = ["compare", "--model", world / "base", "--data", world / "data", "--recipe", "LN()"]
    for done in (command(world, *more, out="nowhere"), call(*compared, "--out", tmp_path / "out", *more)):
        assert done.code == 2
        assert said in done.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("on", "said"),
    [
        ("ray://127.0.0.1:{port}", "nothing answers at 127.0.0.1:.* `ray start --head` begins a cluster"),
        ("ray://127.0.0.1:port", "is no address: Port could not be cast"),
        ("ray://", "names no host; ray://host:port does"),
        ("auto", "on='127.0.0.1:.*': nothing answers at 127.0.0.1:"),
    ],
)
def test_a_cluster_that_does_not_answer_is_one_line(task, monkeypatch, on, said):  # noqa: F811
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(TrainError, match=said) as error:
        searched(task, on=on.format(port=port))
    assert "\n" not in str(error.value)


def test_a_ray_that_refuses_is_one_line(task, monkeypatch):  # noqa: F811
    def init(**options):
        raise ConnectionError("no cluster\nlook at the logs")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(TrainError, match="^on='auto': no Ray can be reached: no cluster; .*RAY_AUTH_MODE=token here$"):
        searched(task, on="auto")


@pytest.mark.parametrize(
    ("there", "trials", "wanted"),
    [
        ({"CPU": 8.0}, 3, (0, 2)),
        ({"CPU": 8.0}, 20, (0, 1)),
        ({"CPU": 8.0, "GPU": 2.0}, 1, (1, 8)),
        ({"GPU": 0.5}, 2, (0, 1)),
    ],
)
def test_a_trial_takes_a_gpu_where_there_are_some_and_idle_cpus_are_threads(monkeypatch, there, trials, wanted):
    calls = []

    class Task:
        def options(self, **options):
            calls.append(options)
            return self

        def remote(self, *arguments):
            calls.append(arguments)

    monkeypatch.setitem(
        sys.modules, "ray", SimpleNamespace(cluster_resources=lambda: there, remote=lambda function: Task())
    )
    work = SimpleNamespace(base="base", rest="rest", settings="settings", out=Path("runs/key/fit"))
    ray_runner._task(trials)(work)
    options, arguments = calls
    assert (options["num_cpus"], options["num_gpus"], arguments[-1]) == (1, *wanted)
    assert arguments[:-1] == (("base", "rest"), "settings", "fit")
    assert options["max_retries"] == ray_runner.RETRIES


def test_rows_are_sent_by_value(tmp_path):
    """Another machine has none of the files that this one's data sets lie in."""
    Dataset.from_dict({"text": ["a", "b", "c"]}).save_to_disk(str(tmp_path / "rows"))
    rows = Dataset.load_from_disk(str(tmp_path / "rows")).select([2, 0])
    assert rows.cache_files
    content = packed({"rows": rows, "values": torch.ones(2)})
    shutil.rmtree(tmp_path / "rows")
    found = unpacked(content)
    assert found["rows"][:] == {"text": ["c", "a"]}
    assert torch.equal(found["values"], torch.ones(2))


def test_a_write_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path / "out", {"one": b"1"})
    assert list((tmp_path / "out").iterdir()) == []
