"""The machine's own matrix rate at MiniLM's shapes, and the share of it that a run reaches; a part of speed.py."""

import statistics
import time

import torch
from contest import BATCH

import smidgen as sm


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
