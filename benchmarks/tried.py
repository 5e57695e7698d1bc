"""What was tried for the step of LN(layers='top:2') and left out, and where its time goes.

python benchmarks/tried.py --data ../shared/data/glue/sst2

Operators of one epoch by torch's profiler; products with weights that oneDNN has packed before; torch's norm with a
bfloat16 input and float32 gain; and a step of five trials stacked by hand against single ones. Medians, in turns.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from environment import describe, write

import smidgen as sm
from smidgen.efficiency.fast_dropout import FastDropout
from smidgen.training.run.loop import Loop

WIDTH, FF, BATCH, TOKENS, HEADS = 384, 1536, 32, 16, 12
LOW = torch.bfloat16


def medians(functions, repeats=60):
    """Milliseconds of each, called in turns."""
    found = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            found[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(times[5:]) for name, times in found.items()}


def operators(data, epoch=2):
    """Operator -> milliseconds of its own a step, in the third epoch, validation apart; and all together."""
    task = sm.Task.load(data, limit={"train": 1600, "validation": 64})
    model, tokenizer = sm.load("minilm", task=task, dtype=LOW)
    run, validate, steps = Loop._epoch, Loop._validate, 1600 // BATCH
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def begin(self, number):
        if number == epoch:
            profiler.start()
        run(self, number)

    def end(self, number):
        if number == epoch:
            profiler.stop()
        validate(self, number)

    Loop._epoch, Loop._validate = begin, end
    try:
        options = {"epochs": epoch + 1, "batching": "length", "batch_size": BATCH, "progress": False}
        sm.fit(model, "LN(layers='top:2')", task, tokenizer=tokenizer, **options)
    finally:
        Loop._epoch, Loop._validate = run, validate
    times = {row.key: row.self_cpu_time_total / 1e3 / steps for row in profiler.key_averages()}
    first = dict(sorted(times.items(), key=lambda item: -item[1])[:16])
    return {"all": sum(times.values()), **first}


def packed():
    """dtype -> how much faster a product is with a packed weight, over the shapes of a feed-forward layer."""
    found = {}
    for dtype in (LOW, torch.float32):
        ratios = []
        for out, into in ((FF, WIDTH), (WIDTH, FF)):
            weight, x = torch.randn(out, into, dtype=dtype), torch.randn(BATCH * TOKENS, into, dtype=dtype)
            ready = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
            times = medians(
                {
                    "plain": lambda x=x, weight=weight: F.linear(x, weight),
                    "packed": lambda x=x, ready=ready: torch.ops.mkldnn._linear_pointwise(
                        x, ready, None, "none", [], ""
                    ),
                }
            )
            ratios.append(times["plain"] / times["packed"])
        found[str(dtype)[6:]] = statistics.mean(ratios)
    return found


def norms():
    """Largest error of the gain's gradient over its largest value: lifted to float32, and torch's mixed kernel."""
    x, g = (torch.randn(BATCH, TOKENS, WIDTH, dtype=LOW) for _ in range(2))
    w, b = torch.randn(WIDTH, requires_grad=True), torch.randn(WIDTH, requires_grad=True)
    wide = w.detach().double().requires_grad_()
    (true,) = torch.autograd.grad(F.layer_norm(x.double(), (WIDTH,), wide, b.detach().double()), wide, g.double())
    ways = {
        "lifted": F.layer_norm(x.float(), (WIDTH,), w, b).to(LOW),
        "mixed": F.layer_norm(x, (WIDTH,), w, b),
    }
    errors = {name: torch.autograd.grad(y, w, g)[0].double() - true for name, y in ways.items()}
    return {name: float(error.abs().max() / true.abs().max()) for name, error in errors.items()}


class Stacked:
    """A training step of the two top blocks, the first token read, for several trials: tensors (trials, ...)."""

    def __init__(self, trials):
        self.trials = trials
        self.up, self.down = (torch.randn(s, dtype=LOW) * 0.05 for s in ((FF, WIDTH), (WIDTH, FF)))
        self.q, self.k, self.v, self.o, self.pool = (torch.randn(WIDTH, WIDTH, dtype=LOW) * 0.05 for _ in range(5))
        self.x, self.y = torch.randn(1, BATCH, TOKENS, WIDTH, dtype=LOW), torch.randint(0, 2, (BATCH,))
        terms = [torch.randn(trials, WIDTH) * 0.1 + (i % 2 == 0) for i in range(8)]
        head = [torch.randn(trials, 2, WIDTH) * 0.05, torch.zeros(trials, 1, 2)]
        self.trained = [p.requires_grad_() for p in (*terms, *head)]
        self.adam = torch.optim.AdamW(self.trained, fused=True)

    def norm(self, x, place):
        gains, biases = self.trained[place : place + 2]
        rows = (F.layer_norm(part.float(), (WIDTH,), g, b).to(LOW) for part, g, b in zip(x, gains, biases, strict=True))
        return torch.stack(list(rows))

    def feed_forward(self, x):
        return F.dropout(F.linear(F.gelu(F.linear(x, self.up)), self.down), 0.1)

    def attention(self, h):
        rows, n = self.trials * BATCH, WIDTH // HEADS
        q = F.linear(h[:, :, 0], self.q).view(rows, HEADS, n).transpose(0, 1).float()
        x = h.reshape(rows, TOKENS, WIDTH).float()
        probe = (q @ self.k.float().view(HEADS, n, WIDTH)).transpose(0, 1)
        share = F.dropout(torch.softmax(probe @ x.transpose(1, 2) * n**-0.5, -1), 0.1)
        mixed = (share @ x).transpose(0, 1) @ self.v.float().view(HEADS, n, WIDTH).transpose(1, 2)
        return F.dropout(F.linear(mixed.transpose(0, 1).reshape(self.trials, BATCH, WIDTH).to(LOW), self.o), 0.1)

    def step(self):
        h = self.norm(self.x.expand(self.trials, BATCH, TOKENS, WIDTH), 0)
        h = self.norm(self.feed_forward(h) + h, 2)
        row = self.norm(self.attention(h) + h[:, :, 0], 4)
        row = self.norm(self.feed_forward(row) + row, 6)
        pooled = F.dropout(torch.tanh(F.linear(row, self.pool)), 0.1)
        logits = torch.baddbmm(self.trained[9], pooled.float(), self.trained[8].transpose(1, 2))
        F.cross_entropy(logits.reshape(-1, 2), self.y.repeat(self.trials)).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.adam.step()
        self.adam.zero_grad()


def stacked(trials=5):
    """How much faster a trial's step is in a stack."""
    with FastDropout():  # as in fit
        times = medians({"single": Stacked(1).step, "stacked": Stacked(trials).step}, repeats=40)
    return {"trials": trials, **times, "ratio": times["single"] / (times["stacked"] / trials)}


def main():
    """Print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="benchmarks/results/tried.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    found = {"packed": packed(), "norms": norms(), "stacked": stacked(), "operators": operators(options.data)}
    for name, said in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in said.items()), flush=True)
    write(options.out, {"options": vars(options), **found, **describe()})


if __name__ == "__main__":
    main()
