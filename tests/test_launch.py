"""`accelerate launch` on several processes of one machine: what one process gives."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from filelock import FileLock

import smidgen as sm
from smidgen.common.errors import TrainError
from smidgen.training.run import processes
from tests import helpers as h
from tests import launched

ROOT = Path(__file__).parents[1]


def launch(folder, names, *options, seconds=240):
    """Cases of tests/launched.py on two processes of this machine's CPU, which need no mpirun started so."""
    told = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", *told, *options]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command += ["--main_process_port", "0", "-m", "tests.launched", str(folder), *names]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds)


def once(factory, name, names, *options):
    """The folder of a launch that all workers of a test run share."""
    folder = factory.getbasetemp() / name
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parents[1] / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            done = launch(folder, names, *options)
            (folder / "status").write_text(str(done.returncode))
            (folder / "said").write_text(done.stdout + done.stderr)
    assert (folder / "status").read_text() == "0", (folder / "said").read_text()[-3000:]
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    names = [*launched.CASES, "LN resumed", "growth resumed", "lost"]
    return once(tmp_path_factory, "replicated", names, "--multi_gpu")


def close(one, other, name):
    """In float64; a causal LM of transformers takes its loss in float32."""
    assert one.keys() == other.keys()
    near = {"rtol": 0, "atol": 1e-6 if launched.CASES[name].get("model") is launched.llama else 1e-12}
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key], **near)


@pytest.mark.parametrize("name", launched.CASES)
def test_two_processes_give_one_process_s_delta(name, two, tmp_path):
    """Also where rows carry unevenly many labels, and where the last batch has a row for one of them alone."""
    delta, told = launched.case(name, tmp_path)
    first, said = launched.found(two, name, 0)
    other, beside = launched.found(two, name, 1)
    h.same(first, other)
    close(first, delta.tensors, name)
    assert said["losses"] == beside["losses"], "each tells the loss of the whole batch"
    assert said["losses"] == pytest.approx(told["losses"], rel=1e-5)
    assert said["examples"] == told["examples"], "none counted twice"
    assert said["references"] == told["references"], "validated once each, in order"
    for now, then in zip(said["scores"], told["scores"], strict=True):
        assert now == pytest.approx(then, rel=1e-5)
    assert said["info"]["best_epoch"] == told["info"]["best_epoch"]


@pytest.mark.parametrize("name", ["LN", "growth"])
def test_a_run_of_two_processes_that_stops_goes_on_bit_for_bit(name, two):
    whole, _ = launched.found(two, name, 0)
    for rank in (0, 1):
        tensors, told = launched.found(two, f"{name} resumed", rank)
        h.same(tensors, whole)
        assert told["first"][0] == "TrainError"
        assert "RuntimeError: on purpose" in told["first"][1]
        assert told["second"] == ["KeyboardInterrupt", ""], "Ctrl-C at one stops both"
        assert told["examples"] == launched.found(two, name, rank)[1]["examples"][6:], "both behind step 6"


def test_one_process_alone_writes(two):
    assert "checkpoint.safetensors" in launched.found(two, "LN resumed", 0)[1]["files"]
    assert "delta.safetensors" in launched.found(two, "LN resumed", 0)[1]["end"]
    assert launched.found(two, "LN resumed", 1)[1]["files"] == launched.found(two, "LN resumed", 1)[1]["end"] == []


def test_a_loss_that_is_lost_in_one_process_ends_both(two):
    for rank in (0, 1):
        kind, said = launched.found(two, "lost", rank)[1]["error"]
        assert kind == "DivergedError"
        assert "the loss is nan at step 2" in said


def test_an_error_in_one_process_ends_the_launch(tmp_path):
    """The launcher ends the process that waits for the one which failed."""
    start = time.monotonic()
    done = launch(tmp_path, ["fails"], "--multi_gpu", seconds=120)
    assert done.returncode != 0
    assert "Fails.on_step failed after step 2 (RuntimeError: on purpose)" in done.stdout + done.stderr
    assert time.monotonic() - start < 100


# What is refused


def refused(folder, said, model=None):
    with pytest.raises(TrainError, match=said) as error:
        sm.fit(model or h.bert(), "LN()", h.task(folder), tokenizer=h.tokenizer(), progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["DeepSpeed", "Megatron-LM"])
def test_what_would_shard_an_optimiser_is_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper().replace('-', '_')}", "true")
    refused(tmp_path, rf"^{name} is not supported; .* use data parallelism \(accelerate launch --multi_gpu\)")


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM"])
def test_so_it_is_where_the_script_itself_has_set_it_up(kind, tmp_path, monkeypatch):
    made = type("Accelerator", (), {"distributed_type": DistributedType[kind]})
    monkeypatch.setattr(processes, "Accelerator", made)
    refused(tmp_path, "(DeepSpeed|Megatron-LM) is not supported")
