"""Several trials stacked on one pass with vmap, against the same number of separate steps: milliseconds a trial-step.

python benchmarks/together.py --data ../shared/data/glue/sst2

The trained tensors of K trials are stacked (K, ...) and the forward pass of MiniLM is vmapped over them; what is
frozen is shared. Both ways run forward and backward, alternating, from the same cache of what lies below, if any.
"""

import argparse
import statistics
import time

import torch
from environment import describe, write

import smidgen as sm
from smidgen.delta.attaching import attach, remove
from smidgen.efficiency.prefix_cache.cache import PrefixCache
from smidgen.planning.frozen_modules import frozen_prefix
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.training.run.batch_feed import around

RECIPES = ("LN(layers='top:2')", "Head()", "LN()", "LoRA()")


class Pass:
    """One batch through a model with a recipe attached, alone or stacked."""

    def __init__(self, model, rows, collate, recipe, training):
        attach(model, recipe)
        self.model, plan = model.train(training), attachment(model).plan
        for module in frozen_prefix(model, plan):
            module.eval()
        self.cache = PrefixCache.of(model, plan)
        if self.cache is not None:
            self.cache.fill(rows, collate)
        self.places, self.batch = list(range(len(rows))), collate([rows[i] for i in range(len(rows))])
        self.masters = trained_parameters(model)
        names = {id(p): name for name, p in model.named_parameters()}
        self.paths = {name: names[id(p)] for name, p in self.masters.items()}

    def alone(self):
        with around(self.cache)(self.places, self.batch):
            self.model(**self.batch).loss.backward()
        return self.gradients(self.masters)

    def apart(self, stacked):
        """Stacked too, but the cached states once for each trial: nothing above the cut is computed once for all."""
        count = len(next(iter(stacked.values())))
        hidden = self.cache.batch(self.places, self.batch["input_ids"].shape[1])

        def loss(tensors, hidden):
            with self.cache.feeding(hidden):
                return torch.func.functional_call(self.model, tensors, kwargs=dict(self.batch)).loss

        each = {self.paths[n]: t for n, t in stacked.items()}
        torch.vmap(loss, randomness="different")(each, hidden.expand(count, *hidden.shape).clone()).sum().backward()
        return self.gradients(stacked)

    def together(self, stacked):
        def loss(tensors):
            return torch.func.functional_call(self.model, tensors, kwargs=dict(self.batch)).loss

        with around(self.cache)(self.places, self.batch):
            torch.vmap(loss, randomness="different")({self.paths[n]: t for n, t in stacked.items()}).sum().backward()
        return self.gradients(stacked)

    def stacked(self, count):
        generator = torch.Generator().manual_seed(0)
        found = {}
        for name, p in self.masters.items():
            noise = 0.05 * torch.randn(count, *p.shape, generator=generator)
            found[name] = (p.detach() + noise).requires_grad_()
        return found

    @staticmethod
    def gradients(tensors):
        found = {name: t.grad for name, t in tensors.items()}
        for t in tensors.values():
            t.grad = None
        return found

    def difference(self, count):
        """Largest relative difference between a trial's gradient alone and together, in the Euclidean norm."""
        stacked = self.stacked(count)
        found, worst = self.together(stacked), 0.0
        start = {name: p.detach().clone() for name, p in self.masters.items()}
        for trial in range(count):
            with torch.no_grad():
                for name, p in self.masters.items():
                    p.copy_(stacked[name][trial])
            for name, gradient in self.alone().items():
                worst = max(worst, float((gradient - found[name][trial]).norm() / gradient.norm().clamp(min=1e-6)))
        with torch.no_grad():
            for name, p in self.masters.items():
                p.copy_(start[name])
        return worst


def seconds(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measured(one, count, repeats):
    """Medians of alternating steps, and of the ratios of neighbours; two separate ones stand for K."""
    stacked = one.stacked(count)
    one.alone(), one.together(stacked)
    alone, together, apart = [], [], []
    for _ in range(repeats):
        alone.append((seconds(one.alone) + seconds(one.alone)) / 2)
        together.append(seconds(lambda: one.together(stacked)) / count)
        if one.cache is not None:
            apart.append(seconds(lambda: one.apart(stacked)) / count)
    found = {"alone_ms": round(1e3 * statistics.median(alone), 2)}
    for name, times in (("together", together), ("nothing shared above the cut", apart)):
        ratios = [round(a / b, 3) for a, b in zip(alone, times, strict=False)]
        if ratios:
            found[name] = {"ms": round(1e3 * statistics.median(times), 2), "times": statistics.median(ratios)}
            found[name]["each"] = ratios
    return found


def arm(options, attention, training, recipe):
    task = sm.Task.load(options.data, limit=options.batch_size)
    model, tokenizer = sm.load("minilm", task=task)
    model.set_attn_implementation(attention)
    rows = task.encode(tokenizer, "train", max_length=options.tokens)
    one = Pass(model, rows, task.collator(tokenizer), recipe, training)
    entry = {"recipe": recipe, "attention": attention, "dropout": training, "cache": one.cache is not None}
    entry["tokens"] = one.batch["input_ids"].shape[1]
    try:
        if not training:
            entry["relative difference"] = one.difference(2)
        entry["trials"] = {k: measured(one, k, options.repeats) for k in options.trials}
    except RuntimeError as error:
        entry["refused"] = str(error).splitlines()[0]
    remove(model)
    print(entry, flush=True)
    return entry


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--trials", type=int, nargs="+", default=[2, 5, 10])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="benchmarks/results/together.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = []
    for attention, training in (("sdpa", False), ("eager", False), ("sdpa", True)):
        for recipe in RECIPES:
            found.append(arm(options, attention, training, recipe))
            write(options.out, {**describe(), "options": vars(options) | {"data": "sst2"}, "arms": found})


if __name__ == "__main__":
    main()
