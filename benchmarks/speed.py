"""Training speed of LN tuning and LoRA: smidgen against HF PEFT under Trainer, and plain full fine-tuning.

python benchmarks/speed.py --data ../shared/data/glue/sst2 --out benchmarks/results/speed.json
python benchmarks/speed.py --data ../shared/data/glue/rte --limit 320 --parts speed --out speed-rte.json

Arms take turns in one process, medians over repeats; examples per second in the steady state (without loading, filling
of the cache, and validation) and of a whole run of ten epochs. Then the final accuracy over seeds, and the share of the
machine's own matrix rate on the products that are needed at all.
"""

import argparse
import contextlib
import gc
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
import peft
import torch
from accelerate.state import AcceleratorState
from environment import describe, write
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

import smidgen as sm
from smidgen.loop import Loop

BATCH, WARMUP = 32, 0.06
ARMS = {
    "peft LN": ("peft", "LN", {}),
    "peft LN grouped": ("peft", "LN", {"grouped": True}),
    "peft LN grouped bf16": ("peft", "LN", {"grouped": True, "bf16": True}),
    "peft LoRA": ("peft", "LoRA", {}),
    "peft LoRA grouped": ("peft", "LoRA", {"grouped": True}),
    "peft LoRA grouped bf16": ("peft", "LoRA", {"grouped": True, "bf16": True}),
    "torch full": ("torch", "Full", {}),
    "smidgen LN()": ("smidgen", "LN()", {}),
    "smidgen LN() fp32": ("smidgen", "LN()", {"dtype": "float32"}),
    "smidgen LN() | Select": ("smidgen", "LN() | Select('fisher', keep=0.1)", {"lr": 1e-2}),
    "smidgen LN(layers='top:2')": ("smidgen", "LN(layers='top:2')", {}),
    "smidgen LN(layers='top:2') fp32": ("smidgen", "LN(layers='top:2')", {"dtype": "float32"}),
    "smidgen LoRA()": ("smidgen", "LoRA()", {}),
}
TOP = ("smidgen LN(layers='top:2') fp32", "smidgen LN(layers='top:2')")
LR = {"LN": 3e-3, "LoRA": 1e-3, "Full": 5e-5}
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


class Marks(TrainerCallback):
    """The time of each step's end."""

    def __init__(self):
        self.times = []

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.perf_counter())


def prepared(kind, model):
    if kind == "Full":
        return model
    common = {"task_type": peft.TaskType.SEQ_CLS}
    if kind == "LN":
        config = peft.LNTuningConfig(target_modules=["LayerNorm"], **common)
    else:
        config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["query", "value"], **common)
    return peft.get_peft_model(model, config)


def with_trainer(task, kind, options, epochs, seed, folder, max_length=None):
    """HF PEFT under Trainer: (model, seconds, seconds per epoch in the steady state)."""
    model, tokenizer = sm.load("minilm", task=task, seed=seed)
    rows = list(task.encode(tokenizer, "train", max_length=max_length))
    strategy = "group_by_length" if options.get("grouped") else "random"
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=BATCH, num_train_epochs=epochs, learning_rate=LR[kind], warmup_steps=WARMUP,
        lr_scheduler_type="linear", bf16=bool(options.get("bf16")), train_sampling_strategy=strategy, use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=seed, max_grad_norm=1.0,
        weight_decay=0.0,
    )  # fmt: skip
    marks = Marks()
    tuned = prepared(kind, model)
    trainer = Trainer(tuned, arguments, train_dataset=rows, data_collator=task.collator(tokenizer), callbacks=[marks])
    start = time.perf_counter()
    trainer.train()
    return tuned, tokenizer, time.perf_counter() - start, steady(marks.times, len(rows))


def with_torch(task, kind, options, epochs, seed, folder):
    """A plain loop over all parameters."""
    model, tokenizer = sm.load("minilm", task=task, seed=seed)
    rows, collate = task.encode(tokenizer, "train"), task.collator(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR[kind], weight_decay=0.0)
    steps = epochs * -(-len(rows) // BATCH)
    rise = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise + 1))
    )
    generator, times = torch.Generator().manual_seed(seed), []
    torch.manual_seed(seed)
    start = time.perf_counter()
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=generator).tolist()
        for first in range(0, len(order), BATCH):
            model(**collate([rows[i] for i in order[first : first + BATCH]])).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            times.append(time.perf_counter())
    return model, tokenizer, time.perf_counter() - start, steady(times, len(rows))


def with_smidgen(task, recipe, options, epochs, seed, folder):
    """sm.fit: (delta, ...). Validation is left out of the steady state, not of the seconds."""
    options = {"batching": "length", "dtype": "auto", **options}
    model, tokenizer = sm.load("minilm", task=task, seed=seed, dtype=options.pop("dtype"))
    if options.pop("gradient_below", False):
        model.enable_input_require_grads()
    times, plain = [], Loop._step

    def step(self, *args):
        begin = time.perf_counter()
        plain(self, *args)
        times.append((begin, time.perf_counter()))

    Loop._step = step
    try:
        start = time.perf_counter()
        delta = sm.fit(
            model, recipe, task, tokenizer=tokenizer, epochs=epochs, seed=seed, progress=False, warmup=WARMUP,
            batch_size=BATCH, **options,
        )  # fmt: skip
        seconds = time.perf_counter() - start
    finally:
        Loop._step = plain
    return (model, delta), tokenizer, seconds, steady_between(times, len(task.splits["train"]))


def steady(times, examples):
    """Seconds per epoch from the ends of its steps, the first five left out."""
    spans = [b - a for a, b in itertools.pairwise(times[4:])]
    return statistics.mean(spans) * -(-examples // BATCH)


def steady_between(times, examples):
    """The same, of (start, end); what lies between two steps counts, but not the validation between epochs."""
    each = -(-examples // BATCH)
    spans = [times[i][1] - times[i - 1][1] for i in range(5, len(times)) if i % each]
    return statistics.mean(spans) * each


HOW = {"peft": with_trainer, "torch": with_torch, "smidgen": with_smidgen}


def one(task, arm, epochs, seed=0):
    how, what, options = ARMS[arm] if isinstance(arm, str) else arm
    AcceleratorState._reset_state(True)  # Trainer's bf16 would stay on for whoever asks Accelerate next
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return HOW[how](task, what, options, epochs, seed, folder)


def speed(task, arms, repeats, epochs):
    """Arm -> examples per second, steady and whole, medians over repeats that take turns, every other one backwards."""
    examples = len(task.splits["train"])
    found = {arm: {"steady": [], "whole": []} for arm in arms}
    for repeat in range(repeats):
        for arm in arms[:: -1 if repeat % 2 else 1]:  # what ran before leaves a warm machine, and a heap
            *_, seconds, epoch = one(task, arm, epochs[arm])
            found[arm]["steady"].append(examples / epoch)
            found[arm]["whole"].append(epochs[arm] * examples / seconds)
            print(f"  {repeat + 1} {arm}: {examples / epoch:.0f} examples/s", flush=True)
            gc.collect()
    return {arm: {k: statistics.median(v) for k, v in kinds.items()} | {"runs": kinds} for arm, kinds in found.items()}


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


def matrix_rate(rows, dtype, seconds=1.0):
    """FLOP/s of the products of a block of MiniLM, in the proportions of one."""
    shapes = [(384, 384)] * 4 + [(384, 1536), (1536, 384)]
    pairs = [(torch.randn(rows, a, dtype=dtype), torch.randn(b, a, dtype=dtype)) for a, b in shapes]
    work, done, start = sum(2 * rows * a * b for a, b in shapes), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for x, weight in pairs:
            torch.nn.functional.linear(x, weight)
        done += work
    return done / (time.perf_counter() - start)


def roofline(task, epoch_seconds):
    """Share of the measured matrix rate that LN()'s needed products reach, padding left out."""
    model, tokenizer = sm.load("minilm", task=task, dtype="auto")
    lengths = task.encode(tokenizer, "train").lengths
    mean = round(statistics.mean(lengths))
    per_token = sm.plan(model, "LN()", batch_size=BATCH, length=mean).costs["training_flops_per_token"]
    rate = statistics.median(matrix_rate(BATCH * mean, model.dtype) for _ in range(5))
    needed = per_token * sum(lengths)
    return {
        "needed_flops_per_epoch": needed, "matrix_rate": rate, "dtype": str(model.dtype)[6:],
        "share": needed / epoch_seconds / rate,
    }  # fmt: skip


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
    options = parser.parse_args()
    if options.step_memory:
        return step_memory(options.step_memory, options.data)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    task = sm.Task.load(options.data, limit={"train": options.limit, "validation": 64})
    results = json.loads(Path(options.out).read_text()) if options.out and Path(options.out).exists() else {}
    for name in options.parts.split(","):
        about = {
            "options": {k: v for k, v in vars(options).items() if k not in ("out", "parts", "step_memory")},
            **describe(),
        }
        results[name] = PARTS[name](task, options, results) | about
        if options.out:
            write(Path(options.out), results)
    table(results)


def speed_part(task, options, results):
    arms = [arm for arm in ARMS if options.arms in arm]
    return {"arms": speed(task, arms, options.repeats, {arm: 10 if "top:2" in arm else 1 for arm in arms})}


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


def table(results):
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
