"""Studies and searches on a real Ray of two workers: the same results, whoever dies."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

import smidgen as sm
from smidgen.common.errors import SmidgenError, TrainError
from smidgen.studies.comparison.comparing import compare
from smidgen.studies.comparison.run_store import RESULT
from smidgen.studies.comparison.study_work import StudyWork
from tests import helpers as h
from tests.test_comparison import base, data, study  # noqa: F401
from tests.test_jobs import Deadly
from tests.test_search import RATES, command, results, searched, task, world  # noqa: F401

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
ARMS = {"LN": "LN()", "head": "Head()"}
FIT = {"README.md", "delta.json", "delta.safetensors", "metrics.jsonl", "run.json"}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def local(base, data, tmp_path_factory):  # noqa: F811
    return compare(study(base, data, arms=ARMS), tmp_path_factory.mktemp("local") / "out")


def same_results(found, wanted):
    assert [r.key for r in found.results] == [r.key for r in wanted.results]
    for mine, other in zip(found.results, wanted.results, strict=True):
        assert mine.error is None
        assert (mine.lr, mine.seed, mine.best_epoch) == (other.lr, other.seed, other.best_epoch)
        assert mine.validation == pytest.approx(other.validation, abs=1e-6)
        assert mine.test == (other.test and pytest.approx(other.test, abs=1e-6))
        assert mine.costs.keys() == other.costs.keys()
        assert mine.costs["trained_values"] == other.costs["trained_values"]


def whole(found):
    """Each run has a folder, with all that the local runner leaves there and nothing else."""
    folders = list((found.store.path / "runs").iterdir())
    assert {folder.name for folder in folders} == {result.key for result in found.results}
    for result in found.results:
        folder = found.store.folder(result.key)
        names = {"efficiency.json", "fit", "result.json"} | ({"test.json"} if result.test else set())
        assert {path.name for path in folder.iterdir()} == names
        assert {path.name for path in (folder / "fit").iterdir()} == FIT
        assert sm.Delta.load(folder / "fit").info["settings"]["seed"] == result.seed


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def at_work():
    """Processes of Ray that make a trial now."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            found += [process] if process.cmdline()[:1] and "smidgen trial" in process.cmdline()[0] else []
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_study_is_that_of_the_local_runner_and_is_not_made_again(base, data, local, tmp_path):  # noqa: F811
    found = compare(study(base, data, arms=ARMS), tmp_path / "out", on="ray")
    same_results(found, local)
    whole(found)
    before = stamps(tmp_path / "out" / "runs")
    assert compare(study(base, data, arms=ARMS), tmp_path / "out", on="ray").results == found.results
    assert stamps(tmp_path / "out" / "runs") == before
    for result in found.results:  # as if killed between a run's end and its result
        (found.store.folder(result.key) / RESULT).unlink()
    same_results(compare(study(base, data, arms=ARMS), tmp_path / "out", on="ray"), local)
    assert {p: t for p, t in stamps(tmp_path / "out" / "runs").items() if p.parent.name == "fit"} == {
        p: t for p, t in before.items() if p.parent.name == "fit"
    }


def test_mistakes_in_a_trial_come_back_as_they_are(task, tmp_path):  # noqa: F811
    with pytest.raises(SmidgenError, match="pooling") as error:
        searched(task, on="ray", pooling="middle")
    assert "\n" not in str(error.value)
    model = h.bert()
    model.lock = threading.Lock()
    with pytest.raises(TrainError, match="Ray sends model.*lock") as error:
        searched(task, model=model, on="ray")
    assert "\n" not in str(error.value)


def test_by_command(world):  # noqa: F811
    rates = [word for lr in RATES for word in ("--lr", lr)]
    found = command(world, *rates, "--on", "ray", "--json", out="on-ray").json
    wanted = command(world, *rates, "--json", out="here").json
    assert found["best"]["lr"] == wanted["best"]["lr"]
    assert [t["scores"] for t in found["trials"]] == [t["scores"] for t in wanted["trials"]]


def test_a_worker_that_is_killed_has_its_run_made_again(base, data, local, tmp_path):  # noqa: F811
    begun, killed = threading.Event(), []

    def kill():
        begun.wait(200)
        until = time.monotonic() + 100
        while not killed and time.monotonic() < until:
            for process in at_work()[:1]:
                process.send_signal(signal.SIGKILL)
                killed.append(process)
            time.sleep(0.005)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    found = compare(study(base, data, arms=ARMS), tmp_path / "out", on="ray", told=lambda result: begun.set())
    thread.join(10)
    assert len(killed) == 1
    assert not killed[0].is_running()
    same_results(found, local)
    whole(found)


@dataclass(frozen=True, eq=False)
class Dying(StudyWork):
    """Its runs at one rate kill their process, each time."""

    def run(self, settings, out, progress, kept):
        if settings.lr == 1e-2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(settings, out, progress, kept)


def test_a_run_that_kills_each_process_fails_alone(base, data, tmp_path, monkeypatch):  # noqa: F811
    given = study(base, data, arms={"LN": "LN()"}, lr=[1e-2, 1e-3])
    with monkeypatch.context() as patch:
        patch.setattr("smidgen.studies.comparison.arm_runs.StudyWork", Dying)
        patch.setattr("smidgen.studies.runners.ray_runner.RETRIES", 1)
        found = compare(given, tmp_path / "out", on="ray")
    lost, *others = found.results
    assert lost.lr == 1e-2
    assert lost.error.startswith("its process was lost 2 times (WorkerCrashedError: ")
    assert not lost.over
    assert [(r.error, r.test is None) for r in others] == [(None, False)] * 2


def test_a_search_is_that_of_one_process_though_one_of_its_own_dies(task, tmp_path):  # noqa: F811
    options = {"seeds": (0, 1), "lr": [1e-2, 1e30, 1e-3]}
    wanted, told = searched(task, **options), []
    model = h.bert(dropout=0.2)
    deadly = Deadly(marker=str(tmp_path / "marker"))
    with h.untouched(model):
        found = searched(
            task, model=model, on="ray", out=tmp_path / "out", objective=deadly, say=told.append, **options
        )
    assert (tmp_path / "marker").exists()
    assert results(found) == results(wanted)
    assert found.best.lr == wanted.best.lr
    assert len(told) == 6
    h.same(found.delta, wanted.delta)
    in_memory = searched(task, on="ray", **options)
    assert results(in_memory) == results(wanted)
    h.same(in_memory.delta, wanted.delta)


def test_a_study_that_is_stopped_goes_on_elsewhere(base, data, local, tmp_path):  # noqa: F811
    """Ctrl-C, with a Ray of the command's own; what is left is made by the one of this module."""
    wanted = replace(local, results=tuple(result for result in local.results if result.arm == "LN"))
    out = tmp_path / "out"
    (tmp_path / "study.toml").write_text(
        f'models = ["{base}"]\ntasks = [{{data = "{data}", name = "films"}}]\nseeds = [0, 1]\ntrials = 2\n'
        '[settings]\nepochs = 1\nbatch_size = 8\nmax_length = 16\n[arms]\nLN = "LN()"\n'
    )
    typed = ["compare", tmp_path / "study.toml", "--out", out, "--on", "ray"]
    environment = {**os.environ, "PYTHONPATH": str(Path(sm.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-m", "smidgen.cli", *typed], env=environment, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 200
    while not (done := list(out.glob(f"runs/*/{RESULT}"))) and time.monotonic() < until:
        time.sleep(0.02)
    processes = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
    assert 0 < len(done) < len(wanted.results)
    before = {path: path.stat().st_mtime_ns for place in done for path in (place.parent / "fit").iterdir()}
    found = compare(study(base, data, arms={"LN": "LN()"}), out, on="ray")
    same_results(found, wanted)
    whole(found)
    assert {path: path.stat().st_mtime_ns for path in before} == before
