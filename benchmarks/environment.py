"""What a result was measured on."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def describe():
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain", "src"], capture_output=True, text=True, check=False)
    packages = ("torch", "transformers", "accelerate", "smidgen", "peft")
    machine = {"processor": platform.machine(), "cores": torch.get_num_threads(), "system": platform.system()}
    if torch.cuda.is_available():
        machine["accelerator"] = torch.cuda.get_device_name()
    return {
        "machine": machine,
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "commit": commit.stdout.strip() + ("+" if dirty.stdout.strip() else ""),
    }


def write(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=1) + "\n")
