"""Exact Fisher information of MiniLM's norms on SST-2: smidgen against a loop over examples, in time and memory.

python benchmarks/fisher.py --data ../shared/data/glue/sst2

Memory is the peak of what the process holds (resident set, sampled every 2 ms), above what it held before.
"""

import argparse
import gc
import statistics
import threading
import time

import psutil
import torch
from environment import describe, write

import smidgen as sm
from smidgen.importance.fisher_information import CHUNK_BYTES, fisher
from smidgen.importance.sample import Sample


class Peak:
    """Seconds and peak growth of the resident set within a block."""

    def __enter__(self):
        gc.collect()
        self.process, self.done = psutil.Process(), threading.Event()
        self.start = self.high = self.process.memory_info().rss
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        self.begin = time.perf_counter()
        return self

    def watch(self):
        while not self.done.wait(0.002):
            self.high = max(self.high, self.process.memory_info().rss)

    def __exit__(self, *error):
        self.seconds = time.perf_counter() - self.begin
        self.done.set()
        self.thread.join()
        self.bytes = self.high - self.start


def loop(model, sample, everything):
    """The published way: one example at a time, loss.backward(), square, add; over the norms' tensors."""
    names = [n for n, _ in model.named_parameters() if "LayerNorm" in n]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(everything or name in names)
    norms = {name: model.get_parameter(name) for name in names}
    totals = {name: torch.zeros_like(p) for name, p in norms.items()}
    for place in range(len(sample)):
        inputs, labels = sample.batch([place], torch.device("cpu"))
        model(**inputs, labels=labels).loss.backward()
        for name, parameter in norms.items():
            totals[name] += parameter.grad.square()
        model.zero_grad(set_to_none=True)
    model.requires_grad_(True)
    return {name: total / len(sample) for name, total in totals.items()}


def plain(model, sample, size):
    """Forward and backward over the same batches, norms requiring gradients: what one batch gradient costs."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("LayerNorm" in name)
    for places in sample.batches(size):
        inputs, labels = sample.batch(places, torch.device("cpu"))
        model(**inputs, labels=labels).loss.backward()
    model.zero_grad(set_to_none=True)
    model.requires_grad_(True)


def difference(found, wanted):
    """Largest relative difference of a tensor, in the Euclidean norm."""
    return max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)


def norms(model, tokenizer, task, options):
    sample = Sample.of_task(task, tokenizer, "train", options.examples, options.seed)
    common = {"seed": options.seed, "tokenizer": tokenizer, "batch_size": options.batch_size}
    arms = {
        "loop": lambda: loop(model, sample, False),
        "loop, all parameters": lambda: loop(model, sample, True),
        "fisher": lambda: fisher(model, task, "LN()", examples=options.examples, **common),
        "plain": lambda: plain(model, sample, options.batch_size),
    }
    runs, values = {name: [] for name in arms}, {}
    arms["plain"]()  # first calls allocate and set up threads
    for _ in range(options.repeats):
        for name, arm in arms.items():
            with Peak() as peak:
                values[name] = arm()
            runs[name].append({"seconds": peak.seconds, "bytes": peak.bytes})
            print(f"{name:22} {peak.seconds:7.2f} s  {peak.bytes / 2**20:7.1f} MB", flush=True)
    seconds = {name: statistics.median(run["seconds"] for run in runs[name]) for name in arms}
    memory = {name: max(run["bytes"] for run in runs[name]) for name in arms}
    return {
        "examples": len(sample),
        "runs": runs,
        "seconds": seconds,
        "times the loop": seconds["loop"] / seconds["fisher"],
        "times the loop, all parameters": seconds["loop, all parameters"] / seconds["fisher"],
        "of plain": seconds["fisher"] / seconds["plain"],
        "extra bytes over plain": memory["fisher"] - memory["plain"],
        "relative difference": difference(values["fisher"], values["loop"]),
        "relative difference, all parameters": difference(values["fisher"], values["loop, all parameters"]),
    }


def matrices(model, tokenizer, task, options):
    """All values of the layers: linear weights and biases, and norms."""
    recipe = f"Full(layers='top:{model.config.num_hidden_layers}')"
    common = {"seed": options.seed, "tokenizer": tokenizer, "batch_size": options.batch_size}
    with Peak() as peak:
        found = fisher(model, task, recipe, examples=options.matrices, chunk_bytes=options.chunk_bytes, **common)
    held = sum(tensor.numel() * 4 for tensor in found.values())
    return {
        "recipe": recipe,
        "examples": found.examples,
        "values": sum(tensor.numel() for tensor in found.values()),
        "looped": found.looped,
        "chunk_bytes": options.chunk_bytes,
        "seconds": peak.seconds,
        "bytes": peak.bytes,
        "bytes of the result": held,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--examples", type=int, default=1024)
    parser.add_argument("--matrices", type=int, default=128, help="examples for the linear weights")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--chunk-bytes", type=int, default=CHUNK_BYTES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/results/fisher.json")
    options = parser.parse_args()
    task = sm.Task.load(options.data)
    model, tokenizer = sm.load("minilm", task=task)
    result = {"norms": norms(model, tokenizer, task, options)}
    result["matrices"] = matrices(model, tokenizer, task, options)
    print({k: v for part in result.values() for k, v in part.items() if k != "runs"})
    write(options.out, {"options": vars(options), **result, **describe()})


if __name__ == "__main__":
    main()
