"""`accelerate launch` on several processes of one machine."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import tempfile
from pathlib import Path
import torch.distributed as dist
import helpers
import smidgen as sm

task = helpers.task(Path(tempfile.mkdtemp()) / "data")
settings = {"epochs": 2, "batch_size": 8, "max_length": 16, "progress": False}
delta = sm.fit(helpers.bert(), sys.argv[1], task, tokenizer=helpers.tokenizer(), **settings)
total = sum(float(t.double().sum()) for t in delta.tensors.values())
print(f"rank {dist.get_rank() if dist.is_initialized() else 0} total {total:.6f}", flush=True)
"""


def launched(folder, processes, recipe):
    (folder / "script.py").write_text(SCRIPT)
    (folder / "hosts").write_text(f"localhost slots={processes}\n")
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--cpu", "--num_processes", str(processes)]
    if processes > 1:
        launch += ["--mpirun_hostfile", "hosts", "--main_process_ip", "127.0.0.1", "--main_process_port", "29577"]
    allow = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }
    path = {"PYTHONPATH": str(Path(__file__).parent) + os.pathsep + str(Path(__file__).parents[1])}
    env = {**os.environ, **allow, **path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launch, "script.py", recipe]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return {int(rank): float(total) for rank, total in re.findall(r"rank (\d) total ([-\d.]+)", done.stdout)}


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="accelerate starts several CPU processes through mpirun")
@pytest.mark.parametrize("recipe", ["LN()", "TriAdaptLoRA(rank=4, growth=1, orthogonality=0.5) + LN()"])
def test_two_processes_end_with_the_same_delta_as_one(recipe, tmp_path):
    two, one = launched(tmp_path, 2, recipe), launched(tmp_path, 1, recipe)
    assert set(two) == {0, 1}
    assert two[0] == two[1] == pytest.approx(one[0], abs=1e-4)
