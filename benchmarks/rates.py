"""Which learning rate suits each method: every method alone at several rates, one seed, accuracy on validation.

python benchmarks/rates.py --data ../shared/data/trec

The default rates of the methods (`Method.lr`) come from their papers, where these give one; this shows how far off they
are on a small encoder with few examples. A run that is in the file is not made again.
"""

import argparse
import json
from pathlib import Path

from environment import describe, write

import smidgen as sm
from smidgen.methods.base import Method
from smidgen.recipe.recipe import Term

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
LEFT_OUT = ("Full", "Head")


def methods():
    """Every registered method that adapts, with its defaults."""
    return {n: c() for n, c in sorted(Term.registry.items()) if issubclass(c, Method) and n not in LEFT_OUT}


def one(method, lr, task, options):
    """Validation accuracy of the best epoch."""
    model, tokenizer = sm.load(options.model, task=task, seed=0, dtype="auto")
    shape = {"epochs": options.epochs, "max_length": 64, "batching": "length", "progress": False}
    delta = sm.fit(model, method, task, lr=lr, tokenizer=tokenizer, **shape)
    found = sm.evaluate(model, task, delta=delta, split="validation", tokenizer=tokenizer, max_length=64)
    return {"accuracy": found.values["accuracy"], "values": delta.trained}


def main():
    """Make the runs that are missing, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=1600)
    parser.add_argument("--validation", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(methods()))
    parser.add_argument("--out", default="benchmarks/results/rates.json")
    options = parser.parse_args()
    out = Path(options.out)
    results = json.loads(out.read_text()) if out.exists() else {"options": vars(options), **describe(), "methods": {}}
    task = sm.Task.load(options.data, limit={"train": options.limit, "validation": options.validation})
    for name in options.only:
        entry = results["methods"].setdefault(name, {"accuracy": {}})
        for lr in RATES:
            if f"{lr:g}" not in entry["accuracy"]:
                found = one(methods()[name], lr, task, options)
                entry["accuracy"][f"{lr:g}"], entry["values"] = found["accuracy"], found["values"]
                write(out, results)
        shown = "  ".join(f"{lr}: {100 * value:.1f}" for lr, value in entry["accuracy"].items())
        print(f"{name:14} {entry['values']:>9,} values  default {methods()[name].lr:g}   {shown}", flush=True)


if __name__ == "__main__":
    main()
