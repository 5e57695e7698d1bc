"""Training speed of LN tuning and LoRA: smidgen against HF PEFT under Trainer, and plain full fine-tuning.

python benchmarks/speed.py --data ../shared/data/glue/sst2 --out benchmarks/results/speed.json
python benchmarks/speed.py --data ../shared/data/glue/rte --limit 320 --parts speed --out speed-rte.json

Every run of an arm is a process of its own; arms take turns, and the load of the machine just before each is kept.
Medians over repeats of examples per second in the steady state (without loading, filling of the cache, and validation)
and of a whole run of ten epochs. A call adds a session to those that --out holds: ratios to PEFT depend on how busy
the cores are, so their range over sessions is what the table prints. Then the final accuracy over seeds, and the share
of the machine's own matrix rate on the products that are needed at all.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import memory
import torch
from contest import ARMS, one, with_smidgen, with_trainer
from environment import describe, write
from roofline import roofline
from transformers.utils import logging

import smidgen as sm

TOP = ("smidgen LN(layers='top:2') fp32", "smidgen LN(layers='top:2')")
COMPARED = [
    "peft LN", "peft LN grouped bf16", "peft LoRA grouped bf16", "smidgen LN()", "smidgen LN() fp32",
    "smidgen LN() | Select", "smidgen LN(layers='top:2')", "smidgen LoRA()",
]  # fmt: skip
PIECES = {  # the same run without one of them: recipe, what both have, what is off
    "no gradient below the lowest edit": ("LN(layers='top:2')", {"cache": False}, {"gradient_below": True}),
    "frozen-prefix cache": ("LN(layers='top:2')", {}, {"cache": False}),
    "no padding that can be avoided": ("LN()", {}, {"batching": "shuffle"}),
    "only the rows that are read": ("LN()", {}, {"only_read": False}),
    "only the rows that are read, top:2": ("LN(layers='top:2')", {}, {"only_read": False}),
    "bfloat16": ("LN()", {}, {"dtype": "float32"}),
    "bfloat16, top:2": ("LN(layers='top:2')", {}, {"dtype": "float32"}),
    "fast dropout": ("LN()", {}, {"fast_dropout": False}),
}


RATIOS = {  # what is compared: the same dtype on both sides, and each with what its library does by default
    "LN(), defaults": ("smidgen LN()", "peft LN"),
    "LN(), float32": ("smidgen LN() fp32", "peft LN"),
    "LN(), float32, both by length": ("smidgen LN() fp32", "peft LN grouped"),
    "LN(), bfloat16, both by length": ("smidgen LN()", "peft LN grouped bf16"),
    "LN(layers='top:2'), defaults": ("smidgen LN(layers='top:2')", "peft LN"),
    "LN(layers='top:2'), float32, both by length": ("smidgen LN(layers='top:2') fp32", "peft LN grouped"),
    "LN(layers='top:2'), bfloat16, both by length": ("smidgen LN(layers='top:2')", "peft LN grouped bf16"),
    "LoRA(), defaults": ("smidgen LoRA()", "peft LoRA"),
    "LoRA(), bfloat16, both by length": ("smidgen LoRA()", "peft LoRA grouped bf16"),
}


def one_run(options):
    """What a process of its own does: one run of an arm, its examples per second as JSON on the last line."""
    task = sm.Task.load(options.data, limit={"train": options.limit, "validation": 64})
    epochs = 10 if "top:2" in options.one_run else 1
    examples = len(task.splits["train"])
    *_, seconds, epoch = one(task, options.one_run, epochs)
    print(json.dumps({"steady": examples / epoch, "whole": epochs * examples / seconds}))


def speed(options, arms):
    """Arm -> examples per second, medians over repeats that take turns, every other one backwards, and the loads."""
    found = {arm: {"steady": [], "whole": [], "load": []} for arm in arms}
    for repeat in range(options.repeats):
        for arm in arms[:: -1 if repeat % 2 else 1]:  # what ran before leaves a warm machine
            load = os.getloadavg()[0]
            call = [sys.executable, "-W", "ignore", __file__, "--data", options.data, "--limit", str(options.limit)]
            said = subprocess.run([*call, "--one-run", arm], capture_output=True, text=True, check=True)
            for kind, value in json.loads(said.stdout.splitlines()[-1]).items():
                found[arm][kind].append(value)
            found[arm]["load"].append(round(load, 2))
            print(f"  {repeat + 1} {arm}: {found[arm]['steady'][-1]:.0f} examples/s, load {load:.1f}", flush=True)
    return {
        arm: {kind: statistics.median(kinds[kind]) for kind in ("steady", "whole")} | {"runs": kinds}
        for arm, kinds in found.items()
    }


def accuracy(task, arms, seeds, epochs):
    """Arm -> accuracy on the validation split of each seed, last epoch (smidgen: best epoch on validation)."""
    scores = {}
    for arm in arms:
        name = arm if isinstance(arm, str) else f"smidgen {arm[1]} lr {arm[2]['lr']:.2g}"
        scores[name] = []
        for seed in range(seeds):
            made, tokenizer, *_ = one(task, arm, epochs, seed)
            model, delta = made if isinstance(made, tuple) else (made, None)
            result = sm.evaluate(model, task, delta=delta, split="validation", tokenizer=tokenizer)
            scores[name].append(result.value)
        print(f"  {name}: {statistics.mean(scores[name]):.4f} over {seeds} seeds", flush=True)
    return scores


def search(task, trials, epochs, jobs):
    """Seconds of the ten-trial search of LN(layers='top:2'), as `smidgen search` runs it."""
    model, tokenizer = sm.load("minilm", task=task, dtype="auto")
    start = time.perf_counter()
    found = sm.search(
        model, "LN(layers='top:2')", task, tokenizer=tokenizer, trials=trials, epochs=epochs, batching="length",
        progress=False, jobs=jobs,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    return {
        "jobs": jobs,
        "seconds": seconds,
        "per_second": trials * epochs * len(task.splits["train"]) / seconds,
        "best_lr": found.best.lr,
        "table": str(found),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=1600)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="of the accuracy runs")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--arms", default="", help="only arms whose name contains this")
    parser.add_argument(
        "--parts", default="speed,roofline,search,memory,accuracy,pieces", help="which parts to run, in order"
    )
    parser.add_argument("--out", default=None, help="parts that stand there already and are not run again are kept")
    parser.add_argument("--step-memory", default=None, help="only print what this arm takes, in MB")
    parser.add_argument("--one-run", default=None, help="only run this arm, once, and print its speed")
    options = parser.parse_args()
    if options.step_memory:
        return step_memory(options.step_memory, options.data)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if options.one_run:
        return one_run(options)
    task = sm.Task.load(options.data, limit={"train": options.limit, "validation": 64})
    results = json.loads(Path(options.out).read_text()) if options.out and Path(options.out).exists() else {}
    for name in options.parts.split(","):
        about = {
            "options": {k: v for k, v in vars(options).items() if k not in ("out", "parts", "step_memory", "one_run")},
            **describe(),
        }
        results[name] = PARTS[name](task, options, results) | about
        if options.out:
            write(Path(options.out), results)
    table(results)


def speed_part(task, options, results):
    """The sessions of before with today's after them; `arms` are today's."""
    found = speed(options, [arm for arm in ARMS if options.arms in arm])
    session = {"day": time.strftime("%Y-%m-%d"), "repeats": options.repeats, "limit": options.limit, **describe()}
    sessions = results.get("speed", {}).get("sessions", [])
    return {"arms": found, "sessions": [*sessions, session | {"arms": found}]}


def roofline_part(task, options, results):
    seconds = options.limit / results["speed"]["arms"]["smidgen LN()"]["steady"]
    found = roofline(task, seconds)
    print(f"  LN(): {found['share']:.2f} of {found['matrix_rate'] / 1e9:.0f} GFLOP/s in {found['dtype']}", flush=True)
    return found


def search_part(task, options, results):
    """One trial after another, and as many at once as there are threads, in turns."""
    runs = {jobs: [] for jobs in dict.fromkeys((1, torch.get_num_threads()))}
    for _, jobs in itertools.product(range(min(3, options.repeats)), runs):
        runs[jobs].append(search(task, options.trials, 10, jobs))
    found = []
    for jobs, each in runs.items():
        each.sort(key=lambda run: run["seconds"])
        found.append(each[len(each) // 2] | {"all_seconds": [run["seconds"] for run in each]})
        print(found[-1]["table"], f"{found[-1]['per_second']:.0f} examples/s, jobs={jobs}", flush=True)
    return found[0] | {"at_once": found[-1]}


def accuracy_part(task, options, results):
    full = sm.Task.load(options.data, limit=options.limit)
    arms = [arm for arm in COMPARED if options.arms in arm]
    if "search" in results:
        best = {"lr": results["search"]["best_lr"]}
        arms.append(("smidgen", "LN(layers='top:2')", best))
    scores = accuracy(full, arms, options.seeds, options.epochs)
    return {"metric": full.metric, "scores": scores}


def pieces_part(task, options, results):
    """Each piece on and off: examples per second of whole runs, and the metric; another seed in every repeat."""
    full, found = sm.Task.load(options.data, limit=options.limit), {}
    for seed, (name, (recipe, both, off)) in itertools.product(range(options.repeats), PIECES.items()):
        for state, given in (("on", both), ("off", both | off)):
            epochs = 10 if "top:2" in recipe else 1
            (model, delta), tokenizer, seconds, _ = one(task, ("smidgen", recipe, given), epochs, seed)
            score = sm.evaluate(model, full, delta=delta, split="validation", tokenizer=tokenizer).value
            entry = found.setdefault(name, {}).setdefault(state, {"per_second": [], "scores": []})
            entry["per_second"].append(epochs * options.limit / seconds)
            entry["scores"].append(score)
    for name, states in found.items():
        on, off = (statistics.median(states[state]["per_second"]) for state in ("on", "off"))
        scores = [statistics.mean(states[state]["scores"]) for state in ("on", "off")]
        said = f"{on:.0f} against {off:.0f} examples/s, x {on / off:.2f}"
        print(f"  {name}: {said}; {full.metric} {scores[0]:.4f} and {scores[1]:.4f}", flush=True)
    return {"metric": full.metric, "pieces": found}


def memory_part(task, options, results):
    """MB that a run on batches of 32 x 64 tokens takes above what its process held before."""
    found = {}
    for arm in ("peft LN", "peft LN grouped bf16", "smidgen LN() fp32", "smidgen LN()", *TOP):
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
        call = [sys.executable, "-W", "ignore", __file__, "--data", options.data, "--step-memory", arm]
        said = [subprocess.run(call, env=environment, capture_output=True, text=True, check=True) for _ in range(3)]
        found[arm] = statistics.median(float(one.stdout.split()[-1]) for one in said)
        print(f"  {arm}: {found[arm]:.0f} MB, {found[arm] / found['peft LN']:.2f} of PEFT's", flush=True)
    return {"megabytes": found}


def step_memory(arm, data):
    """Of this process; a short run first sets up libraries and kernels."""
    task = sm.Task.load(data, limit={"train": 2000, "validation": 32})
    texts = task.splits["train"][task.text[0]][:]
    with tempfile.TemporaryDirectory() as folder:
        for name, count in (("train", 256), ("validation", 32)):
            rows = [{"text": " ".join(texts[i : i + 12]), "label": str(i % 2)} for i in range(count)]
            Path(folder, f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        long = sm.Task.load(folder)
    short = sm.Task.load(data, limit={"train": 64, "validation": 32})
    how, what, given = ARMS[arm]
    one(short, arm, 4)
    begin = memory.start("cpu")
    if how == "peft":
        with tempfile.TemporaryDirectory() as folder:
            with_trainer(long, what, given, 2, 0, folder, max_length=64)
    else:
        with_smidgen(long, what, {**given, "max_length": 64}, 2, 0, None)
    print((memory.peak("cpu") - begin) / 1e6)


PARTS = {
    "speed": speed_part, "roofline": roofline_part, "search": search_part, "accuracy": accuracy_part,
    "pieces": pieces_part,
    "memory": memory_part,
}  # fmt: skip


def ranges(sessions):
    """Name of a ratio -> its smallest and largest value over the sessions that have both arms."""
    found = {}
    for name, (ours, theirs) in RATIOS.items():
        each = [
            s["arms"][ours]["steady"] / s["arms"][theirs]["steady"]
            for s in sessions
            if {ours, theirs} <= set(s["arms"])
        ]
        if each:
            found[name] = (min(each), max(each))
    return found


def table(results):
    for name, (low, high) in ranges(results.get("speed", {}).get("sessions", [])).items():
        print(f"{name:46} x {low:.2f} to {high:.2f}")
    arms = results.get("speed", {}).get("arms", {})
    base, best = (arms.get(arm) for arm in ("peft LN", "peft LN grouped bf16"))
    for arm, found in arms.items():
        ratios = [
            found[kind] / other[kind] if other else float("nan")
            for kind in ("steady", "whole")
            for other in (base, best)
        ]
        scores = results.get("accuracy", {}).get("scores", {}).get(arm)
        said = f"{statistics.mean(scores):.4f}" if scores else ""
        steady = " ".join(f"x{ratio:5.2f}" for ratio in ratios[:2])
        whole = " ".join(f"x{ratio:5.2f}" for ratio in ratios[2:])
        print(f"{arm:32} {found['steady']:6.0f}/s steady {steady}  whole {whole}  {said}")


if __name__ == "__main__":
    main()
