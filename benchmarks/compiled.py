"""torch.compile on an attached model: seconds of a training step, eager and compiled, alternating; and what it costs.

python benchmarks/compiled.py

Random batches of MiniLM's width, 32 x 24 tokens, in float32 and bfloat16; AdamW on what is trained. Compile time is
that of the first three steps. Lengths 16 to 32 in turn show what changing shapes cost (dynamic shapes).
"""

import argparse
import statistics
import time
import warnings

import torch
from environment import describe, write

import smidgen as sm

RECIPES = ("LN()", "LN(layers='top:2')", "LoRA()")


def step(model, adam, length, generator):
    """Seconds of one training step."""
    ids = torch.randint(5, 30000, (32, length), generator=generator)
    labels = torch.randint(2, (32,), generator=generator)
    begin = time.perf_counter()
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
    adam.step()
    adam.zero_grad()
    return time.perf_counter() - begin


def arm(recipe, dtype, lengths, repeats):
    """Seconds of steps in both ways, and of the first compiled one."""
    torch.manual_seed(0)
    task = sm.Task.load("bbc-news", limit=64)
    model, _ = sm.load("minilm", task=task, dtype=dtype)
    sm.attach(model, recipe)
    model.train()
    adam, generator = sm.optimizer(model), torch.Generator().manual_seed(0)
    compiled = torch.compile(model, dynamic=len(lengths) > 1)
    begin = time.perf_counter()
    for length in lengths[:3]:
        step(compiled, adam, length, generator)
    warm = time.perf_counter() - begin
    runs = {"eager": [], "compiled": []}
    for _ in range(repeats):
        for name, which in (("eager", model), ("compiled", compiled)):
            runs[name].append(statistics.mean(step(which, adam, length, generator) for length in lengths))
    medians = {name: statistics.median(found) for name, found in runs.items()}
    return {
        "recipe": recipe,
        "dtype": str(dtype)[6:],
        "lengths": list(lengths),
        "seconds": medians,
        "ratio": medians["eager"] / medians["compiled"],
        "compile_seconds": warm,
        "steps_to_pay": warm / max(1e-9, medians["eager"] - medians["compiled"]),
        "runs": runs,
    }


def main():
    """Print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", default="benchmarks/results/compiled.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for recipe in RECIPES:
            for lengths in ((24,), (16, 20, 24, 28, 32)):
                found = arm(recipe, dtype, lengths, options.repeats)
                results.append(found)
                torch._dynamo.reset()
                print(
                    f"{recipe:20} {found['dtype']:9} {len(lengths)} lengths: eager "
                    f"{1e3 * found['seconds']['eager']:.1f} ms, compiled {1e3 * found['seconds']['compiled']:.1f} ms, "
                    f"{found['ratio']:.2f}x, compiling {found['compile_seconds']:.0f} s",
                    flush=True,
                )
    write(options.out, {"options": vars(options), "arms": results, **describe()})


if __name__ == "__main__":
    main()
