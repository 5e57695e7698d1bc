"""Which methods does LayerNorm tuning help? Seven methods x {without, with LN()} on two tasks, as the first work asks.

python studies/unified/run.py --data ../shared/data/trec ../shared/data/glue/sst2
python studies/unified/run.py --table          # the table from what is there

Rules: same examples, epochs, batches, schedule and head in all arms. Each arm's learning rate is the best of the same
three on the validation part with seed 0; then seeds 1, 2, 3 are scored on the test part. A run that is in results.json
is not made again, so a study that was stopped goes on.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import smidgen as sm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))
from environment import describe, write  # noqa: E402
from table import render  # noqa: E402

METHODS = {
    "none": "Head()",
    "Prefix": "Prefix(length=30)",
    "attention Adapter": "Adapter(site='attention', width=64)",
    "feed-forward Adapter": "Adapter(site='feed_forward', width=64)",
    "Prefix + attention Adapter": "Prefix(length=30) + Adapter(site='attention', width=64)",
    "MAM": "MAM",
    "LoRA": "LoRA()",
}
RATES, SEEDS = (1e-3, 3e-3, 1e-2), (1, 2, 3)


def arms(methods):
    """(method, with LN or not) -> recipe."""
    for name in methods:
        spelling = METHODS[name]
        yield name, False, spelling
        yield name, True, "LN()" if name == "none" else f"{spelling} + LN()"


def one(recipe, task, lr, seed, split, options):
    """One run: score, which examples were right (hexadecimal, behind a leading 1), trained values."""
    torch.manual_seed(seed)
    model, tokenizer = sm.load(options.model, task=task, seed=seed, dtype=options.dtype)
    shape = {"epochs": options.epochs, "max_length": options.max_length, "batching": "length"}
    delta = sm.fit(model, recipe, task, lr=lr, seed=seed, tokenizer=tokenizer, progress=False, **shape)
    found = sm.evaluate(model, task, delta=delta, split=split, tokenizer=tokenizer, max_length=options.max_length)
    right = "".join("01"[p == r] for p, r in zip(found.predictions, found.references, strict=True))
    return {"accuracy": found.values["accuracy"], "right": f"{int('1' + right, 2):x}", "values": delta.trained}


def main():
    """Make the runs that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--data", nargs="+", default=["../shared/data/trec", "../shared/data/glue/sst2"])
    parser.add_argument("--limit", type=int, default=1600)
    parser.add_argument("--validation", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", default=str(HERE / "results.json"))
    options = parser.parse_args()
    out = Path(options.out)
    results = json.loads(out.read_text()) if out.exists() else {"options": vars(options), **describe(), "runs": []}
    if not options.table:
        for data in options.data:
            study(data, results, options, out)
    print(render(results))


def study(data, results, options, out):
    """All runs on one task."""
    task = sm.Task.load(data, limit={"train": options.limit, "validation": options.validation})
    name = Path(data).name
    for seed, split in ((0, "validation"), *((seed, "test") for seed in SEEDS)):
        for method, norm, recipe in arms(options.methods):
            for lr in RATES if seed == 0 else (best(results, name, method, norm),):
                key = {"task": name, "method": method, "ln": norm, "lr": lr, "seed": seed}
                if any(key.items() <= run.items() for run in results["runs"]):
                    continue
                run = {**key, "recipe": recipe, **one(recipe, task, lr, seed, split, options)}
                results["runs"].append(run)
                write(out, results)
                print(*key.values(), f"{run['accuracy']:.4f}", flush=True)


def best(results, task, method, norm):
    """The rate of the best validation accuracy with seed 0; the smaller of two that are equal."""
    key = {"task": task, "method": method, "ln": norm, "seed": 0}
    found = [run for run in results["runs"] if key.items() <= run.items()]
    return max(found, key=lambda run: (run["accuracy"], -run["lr"]))["lr"]


if __name__ == "__main__":
    main()
