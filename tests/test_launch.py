"""`accelerate launch` on several processes of one machine: what one process gives."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from filelock import FileLock

import smidgen as sm
from smidgen.common.errors import TrainError
from smidgen.steps.objectives import Needs
from smidgen.training.run import processes
from smidgen.training.run.shard_limits import check_sharded
from tests import helpers as h
from tests import launched

ROOT = Path(__file__).parents[1]


def launch(folder, names, *options):
    """Cases of tests/launched.py on two processes of this machine's CPU, which need no mpirun started so."""
    told = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", *told, *options]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command += ["--main_process_port", "0", "-m", "tests.launched", str(folder), *names]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


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
    assert all((folder / f"{name}.{rank}.json").exists() for name in names if name != "fails" for rank in (0, 1)), (
        folder / "said"
    ).read_text()[-3000:]
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    names = [*REPLICATED, "LN resumed", "growth resumed", "lost", "others", "fails"]
    return once(tmp_path_factory, "replicated", names, "--multi_gpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    names = [*SHARDED, "LN resumed", "lost", "others", "every method", "layouts"]
    return once(tmp_path_factory, "sharded", names, "--use_fsdp", "--fsdp_version", "2")


def close(one, other, name):
    """In float64; a causal LM of transformers takes its loss in float32."""
    assert one.keys() == other.keys()
    near = {"rtol": 0, "atol": 1e-6 if launched.CASES[name].get("model") in launched.CAUSAL else 1e-10}
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key], **near)


REPLICATED = ["LN", "LoRA", "two parts", "growth", "sum", "causal", "causal by length", "packed", "chosen"]
SHARDED = ["LN", "LoRA", "two parts", "growth", "chosen", "causal", "causal LoRA", "packed", "close", "recomputed"]
SHARDED += ["tied", "gpt2", "albert"]


def agrees(name, folder, tmp_path):
    """Both processes found what one finds. Gives what the first said, and what the one."""
    delta, told = launched.case(name, tmp_path)
    first, said = launched.found(folder, name, 0)
    other, beside = launched.found(folder, name, 1)
    h.same(first, other)
    close(first, delta.tensors, name)
    assert said["losses"] == beside["losses"], "each tells the loss of the whole batch"
    assert said["losses"] == pytest.approx(told["losses"], rel=1e-5)
    assert said["examples"] == told["examples"], "none counted twice"
    assert said["references"] == told["references"], "validated once each, in order"
    for now, then in zip(said["scores"], told["scores"], strict=True):
        assert now == pytest.approx(then, rel=1e-5)
    assert said["best"] == told["best"]
    assert said["base"] == beside["base"] == told["base"]
    assert said["left"], "the base is as before"
    assert beside["left"]
    return said, beside


@pytest.mark.parametrize("name", REPLICATED)
def test_two_processes_give_one_process_s_delta(name, two, tmp_path):
    """Also where rows carry unevenly many labels, and where the last batch has a row for one of them alone."""
    agrees(name, two, tmp_path)


@pytest.mark.parametrize("name", SHARDED)
def test_a_base_in_shards_gives_one_process_s_delta(name, shards, tmp_path):
    for said in agrees(name, shards, tmp_path):
        resident = said["resident"]
        assert resident["trained in shards"] == 0
        assert resident["whole"] == resident["trained"], "but for what is trained, all is in shards"
        assert 0.45 < resident["of them here"] / resident["in shards"] < 0.6, "about half in each process"
        assert resident["left in the base"] < 0.5 * resident["in shards"]
        assert said["merged"] < 1e-10, "the base, whole again, takes the delta in"


def test_every_method_trains_beside_a_base_in_shards(shards, tmp_path):
    wanted, told = launched.every(tmp_path)
    for rank in (0, 1):
        found, said = launched.found(shards, "every method", rank)
        assert said == {**told, "left": True}
        assert found.keys() == wanted.keys()
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, wanted[key], rtol=0, atol=1e-8)


def test_gradients_beside_a_base_in_shards_are_those_beside_a_whole_one(shards):
    """Fused maps, experts, an encoder beside a decoder, shared blocks, two towers with a single number."""
    for rank in (0, 1):
        found = launched.found(shards, "layouts", rank)[1]
        assert found.keys() == set(launched.LAYOUTS)
        assert max(found.values()) < 1e-9, found


def test_a_run_in_shards_that_stops_goes_on_bit_for_bit(shards):
    whole, _ = launched.found(shards, "LN", 0)
    for rank in (0, 1):
        tensors, told = launched.found(shards, "LN resumed", rank)
        h.same(tensors, whole)
        assert told["first"][2] == "The base is left in shards, its own parameters empty: load it anew."
        assert told["second"][0] == "KeyboardInterrupt"


def test_a_loss_that_is_lost_gives_the_base_back_whole(shards):
    for rank in (0, 1):
        told = launched.found(shards, "lost", rank)[1]
        assert told["error"][0] == "DivergedError"
        assert told["left"]


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


@pytest.mark.parametrize("folder", ["two", "shards"])
def test_processes_that_differ_are_refused_in_each(folder, request):
    for rank in (0, 1):
        told = launched.found(request.getfixturevalue(folder), "others", rank)[1]
        for what, name in (("base", "base"), ("rows", "task")):
            kind, said = told[what]
            assert kind == "TrainError"
            assert said == f"process 1 has another {name} than process 0; load and draw the same in every process"


def test_an_error_in_one_process_ends_the_launch(two):
    """The launcher ends the process that waits for the one which failed, long before a collective times out."""
    assert (two / "status").read_text() != "0"
    assert "Fails.on_step failed after step 2 (RuntimeError: on purpose)" in (two / "said").read_text()


def test_a_launch_without_errors_ends_well(shards):
    assert (shards / "status").read_text() == "0"


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


def test_other_shards_than_fsdp2_s_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    refused(tmp_path / "one", r"^FSDP of version 1 is not supported, .* launch with --fsdp_version 2$")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    refused(tmp_path / "two", r"^FSDP2 with shards in the host's memory .* leave --fsdp_offload_params out$")


@dataclass(frozen=True)
class FromStart(sm.Objective):
    """Reads a frozen copy of the model."""

    def needs(self, kind):
        return Needs(references={"before": "start"})


def test_what_needs_a_whole_base_in_each_process_is_refused_beside_shards(tmp_path):
    task = h.task(tmp_path / "data")
    with pytest.raises(TrainError, match=r"^FromStart keeps 'before', another model beside .* leave --use_fsdp out$"):
        check_sharded(FromStart(), task)
    pairs = [{"text": "the film", "summary": "good"}, {"text": "a plot", "summary": "bad"}]
    folder = h.jsonl(tmp_path / "written" / "train.jsonl", pairs).parent
    written = sm.Task.load(folder, kind="seq2seq", text=("text", "summary"), metric="bleu")
    with pytest.raises(TrainError, match=r"^bleu reads what the model writes, .* leave --use_fsdp out$"):
        check_sharded(sm.TaskLoss(), written)
    check_sharded(sm.StayClose(), task)
