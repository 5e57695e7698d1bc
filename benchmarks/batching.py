"""LN() on SST-2: shuffled batches, batches of like length, of so many tokens, and a bfloat16 base: accuracy and time.

python benchmarks/batching.py --data ../shared/data/glue/sst2

Arms take turns, seed by seed, in an order that moves on by one; seconds are those of the steps of an epoch, without
validation. Accuracy is that of the best epoch on the validation split, on that split. Differences are paired by seed.
"""

import argparse
import math
import statistics
import time
from contextlib import contextmanager

from environment import describe, write
from scipy.stats import t

import smidgen as sm
from smidgen.training.run.loop import Loop


class Clock:
    """Seconds, steps and padding of each epoch of `fit` within a block."""

    def __init__(self):
        self.epochs = []

    @contextmanager
    def watching(self):
        epoch, step, validate = Loop._epoch, Loop._step, Loop._validate
        this = self

        def timed_epoch(loop, number):
            this.epochs.append({"steps": 0, "tokens": 0, "padded": 0})
            this.begin = time.perf_counter()
            epoch(loop, number)

        def counted_step(loop, places, batch):
            now = this.epochs[-1]
            now["steps"] += 1
            now["tokens"] += int(batch["attention_mask"].sum())
            now["padded"] += batch["attention_mask"].numel()
            step(loop, places, batch)

        def timed_validate(loop, number):
            this.epochs[-1]["seconds"] = time.perf_counter() - this.begin
            validate(loop, number)

        Loop._epoch, Loop._step, Loop._validate = timed_epoch, counted_step, timed_validate
        try:
            yield
        finally:
            Loop._epoch, Loop._step, Loop._validate = epoch, step, validate


def arms(options):
    return {
        "shuffle": {"batching": "shuffle"},
        "length": {"batching": "length"},
        "tokens": {"batch_tokens": options.batch_tokens},
        "bfloat16": {"dtype": "bfloat16"},
    }


def one(settings, task, options, seed):
    settings = dict(settings)
    model, tokenizer = sm.load("minilm", task=task, seed=seed, dtype=settings.pop("dtype", "float32"))
    common = {"seed": seed, "epochs": options.epochs, "batch_size": options.batch_size, "tokenizer": tokenizer}
    clock = Clock()
    with clock.watching():
        delta = sm.fit(model, "LN()", task, progress=False, **common, **settings)
    scores = sm.evaluate(model, task, delta=delta, split="validation", tokenizer=tokenizer)
    return {"seed": seed, "score": scores.value, "best epoch": delta.info["best_epoch"], "epochs": clock.epochs}


def summary(values):
    """Mean and standard deviation; the latter needs two values."""
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def paired(values, others):
    """Mean difference and its 95 % interval by Student's t over pairs."""
    found = summary([a - b for a, b in zip(values, others, strict=True)])
    if found["sd"] is None:
        return {**found, "interval": None}
    half = float(t.ppf(0.975, len(values) - 1)) * found["sd"] / math.sqrt(len(values))
    return {**found, "interval": [found["mean"] - half, found["mean"] + half]}


def condensed(runs):
    epochs = [epoch for run in runs for epoch in run["epochs"]]
    tokens, padded = (sum(epoch[key] for epoch in epochs) for key in ("tokens", "padded"))
    found = {"score": summary([run["score"] for run in runs])}
    found["seconds per epoch"] = statistics.median(epoch["seconds"] for epoch in epochs)
    return found | {"steps per epoch": statistics.mean(e["steps"] for e in epochs), "padding": 1 - tokens / padded}


def compared(runs, other):
    """Against the shuffled arm, seed by seed."""
    seconds = [[statistics.median(e["seconds"] for e in run["epochs"]) for run in arm] for arm in (runs, other)]
    scores = [[run["score"] for run in arm] for arm in (runs, other)]
    return {"score": paired(*scores), "seconds per epoch": paired(*seconds)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=1600, help="training sentences")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=448, help="gives 49 steps an epoch, 32 rows give 50")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", default="benchmarks/results/batching.json")
    options = parser.parse_args()
    task, about = sm.Task.load(options.data, limit=options.limit), describe()
    settings = arms(options)
    names, runs = list(settings), {name: [] for name in settings}
    for seed in range(options.seeds):
        for place in range(len(names)):
            name = names[(seed + place) % len(names)]
            runs[name].append(one(settings[name], task, options, seed))
            last = runs[name][-1]
            times = " ".join(f"{epoch['seconds']:.1f}" for epoch in last["epochs"])
            print(f"seed {seed}  {name:8} {task.metric} {last['score']:.4f}  {times} s", flush=True)
    found = {name: condensed(runs[name]) for name in names}
    against = {name: compared(runs[name], runs["shuffle"]) for name in names[1:]}
    print(found, against, sep="\n")
    content = {"options": vars(options), "metric": task.metric, "arms": found, "minus shuffle": against, "runs": runs}
    write(options.out, content | about)


if __name__ == "__main__":
    main()
