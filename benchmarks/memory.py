"""Peak memory of a training step on MiniLM: what `plan` estimates against what a process then takes.

python benchmarks/memory.py                  # CPU: growth of the peak resident set
python benchmarks/memory.py --device cuda    # GPU: torch's allocator

Each measurement is a process of its own that loads the model, trains two steps on a tiny batch so that libraries and
kernels are set up, and then trains three steps on the batch in question. Weights count in neither figure: `estimate` is
`peak_bytes` less `weights_bytes`, `measured` is what the process takes above what it held before. On a CPU glibc keeps
MALLOC_MMAP_THRESHOLD_ at 128 KiB, which gives freed tensors back to the system; `by default` is without that.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from environment import describe, write

import smidgen as sm
from smidgen.efficiency.activation_checkpointing import recomputing
from smidgen.planning.frozen_modules import frozen_prefix
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.steps.gradient_checks import snapshot
from smidgen.steps.optimizer_groups import optimizer

RECIPES = ("LN()", "LN(layers='top:2')", "LoRA()", "BitFit()", "Full()")
SHAPES = ((32, 16), (32, 64), (16, 256))
THRESHOLD = "131072"


def load(dtype):
    return sm.load("minilm", task=sm.Task.load("bbc-news", limit=20), dtype=dtype)[0]


def status(key):
    """Bytes of an entry of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def start(device):
    """Bytes held now; from here on the peak is kept."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    return status("VmRSS")


def peak(device):
    return torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")


def train(model, recipe, size, length, steps, recompute, device):
    """Steps as `fit` takes them, on texts of which the odd ones are half padding."""
    sm.attach(model, recipe)
    model.train()
    for module in frozen_prefix(model, attachment(model).plan):
        module.eval()
    adam, first, best = optimizer(model), snapshot(model), snapshot(model)
    mask = torch.ones(size, length, dtype=torch.long, device=device)
    mask[1::2, length // 2 :] = 0
    labels = torch.zeros(size, dtype=torch.long, device=device)
    with recomputing(model) if recompute else nullcontext():
        for _ in range(steps):
            ids = torch.randint(1000, 30000, (size, length), device=device)
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(list(trained_parameters(model).values()), 1.0)
            adam.step()
            adam.zero_grad(set_to_none=True)
    del adam, first, best
    sm.detach(model)


def measure(job):
    """In a process of its own: bytes above those held before."""
    model = load(job["dtype"]).to(job["device"])
    shared = {"device": job["device"], "recompute": job["recompute"]}
    train(model, job["recipe"], 2, 8, 2, **shared)
    before = start(job["device"])
    train(model, job["recipe"], job["batch_size"], job["length"], 3, **shared)
    return peak(job["device"]) - before


def apart(job, fixed):
    """`measure` in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("MALLOC_MMAP_THRESHOLD_", None)
    environment |= {"MALLOC_MMAP_THRESHOLD_": THRESHOLD} if fixed else {}
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def jobs(options):
    """float32 for all recipes and shapes, and for two of them with recomputation; then bfloat16."""
    arms = [(dtype, recipe, False) for dtype in options.dtypes for recipe in RECIPES]
    arms += [("float32", recipe, True) for recipe in ("LN()", "LN(layers='top:2')")]
    for dtype, recipe, recompute in arms:
        for size, length in SHAPES:
            shape = {"batch_size": size, "length": length}
            yield {"dtype": dtype, "recipe": recipe, "recompute": recompute, **shape, "device": options.device}


def row(job, models, by_default):
    """A job with its estimate, its measurements and their ratio."""
    shape = {name: job[name] for name in ("batch_size", "length", "recompute")}
    costs = sm.plan(models[job["dtype"]], job["recipe"], **shape).costs
    found = {**job, "estimate": costs["peak_bytes"] - costs["weights_bytes"], "measured": apart(job, True)}
    if by_default:
        found["by default"] = apart(job, False)
    return {**found, "ratio": found["estimate"] / found["measured"]}


def show(found):
    name = found["recipe"] + (" recomputed" if found["recompute"] else "")
    figures = " ".join(f"{found[key] / 1e6:9.1f}" for key in ("estimate", "measured"))
    other = f"{found['by default'] / 1e6:9.1f}" if "by default" in found else " " * 9
    shape = f"{found['batch_size']}x{found['length']}"
    print(f"{found['dtype']:9} {name:30} {shape:7} {figures} {found['ratio']:6.3f} {other}", flush=True)


def extremes(rows, models):
    """Smallest and largest ratio for each dtype, without the weights and with them in both figures."""
    found = {}
    for dtype in sorted({entry["dtype"] for entry in rows}):
        weights = sum(p.nbytes for p in models[dtype].parameters())
        ours = [entry for entry in rows if entry["dtype"] == dtype]
        bare = [entry["ratio"] for entry in ours]
        whole = [(entry["estimate"] + weights) / (entry["measured"] + weights) for entry in ours]
        found[dtype] = {"without weights": [min(bare), max(bare)], "with weights": [min(whole), max(whole)]}
    return found


def store(options, rows, models):
    kept = {k: v for k, v in vars(options).items() if k not in ("job", "go_on")}
    ratios = {"ratios": extremes(rows, models), "rows": rows}
    write(options.out, {"options": kept, "threshold": THRESHOLD, **ratios, **describe()})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--by-default", nargs="*", default=["LN()", "Full()"], help="recipes to measure so too, float32"
    )
    parser.add_argument("--out", default="benchmarks/results/memory.json")
    parser.add_argument("--go-on", action="store_true", help="keep the rows that --out holds")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(measure(json.loads(options.job)))
        return
    models = {dtype: load(dtype) for dtype in {"float32", *options.dtypes}}
    print(f"{'':48}  estimate  measured  ratio  by default  (MB)")
    rows = json.loads(Path(options.out).read_text())["rows"] if options.go_on else []
    for job in jobs(options):
        if not any(job.items() <= found.items() for found in rows):
            plain = options.device == "cpu" and job["dtype"] == "float32" and not job["recompute"]
            rows.append(row(job, models, plain and job["recipe"] in options.by_default))
            show(rows[-1])
            store(options, rows, models)
    store(options, rows, models)
    print(extremes(rows, models))


if __name__ == "__main__":
    main()
