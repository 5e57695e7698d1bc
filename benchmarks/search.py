"""A search over learning rates against the same runs of fit, one after another: seconds, alternating.

python benchmarks/search.py --data ../shared/data/glue/sst2
"""

import argparse
import statistics
import time
import warnings

import torch
from environment import describe, write

import smidgen as sm

ARMS = (("LN(layers='top:2')", 1), ("LN(layers='top:2')", 3), ("Head()", 3))


def seconds(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def arm(options, recipe, epochs):
    limit = {"train": options.examples, "validation": options.examples // 4}
    task = sm.Task.load(options.data, limit=limit)
    model, tokenizer = sm.load("minilm", task=task)
    common = {"tokenizer": tokenizer, "epochs": epochs, "max_length": options.tokens, "progress": False}
    found = sm.search(model, recipe, task, trials=options.trials, **common)

    def alone():
        for rate in found.rates:
            sm.fit(model, recipe, task, **{found.rate: rate}, **common)

    ways = {"search": lambda: sm.search(model, recipe, task, trials=options.trials, **common), "fit": alone}
    runs = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            runs[name].append(round(seconds(way), 2))
    times = statistics.median(b / a for a, b in zip(runs["search"], runs["fit"], strict=True))
    entry = {"recipe": recipe, "epochs": epochs, "seconds": runs, "times": round(times, 3)}
    print(entry, flush=True)
    return entry


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default="benchmarks/results/search.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", sm.SearchWarning)
    found = []
    for recipe, epochs in ARMS:
        found.append(arm(options, recipe, epochs))
        write(options.out, {**describe(), "options": vars(options) | {"data": "sst2"}, "arms": found})


if __name__ == "__main__":
    main()
