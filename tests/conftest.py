import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import smidgen.methods  # noqa: F401  (fills the registry)

torch.set_num_threads(1)  # tiny models: more threads only wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def shared():
    if not (SHARED / "data").is_dir():
        pytest.skip("the shared data folder is not beside the checkout")
    return SHARED / "data"
