"""How long it takes to change what a model does: sm.Deltas, HF PEFT's set_adapter, and loading from a folder.

python benchmarks/switch.py

MiniLM with a head of two labels. Two deltas of each recipe and two adapters of PEFT with values drawn at random: what
they are trained to has no part in it. Every switch is checked once: logits as with the delta attached to a fresh model.
Times are processor time of the process, on one thread, so that what else runs on the machine has little part in them;
files come from the system's cache.
"""

import argparse
import statistics
import tempfile
import time

import torch
from environment import describe, write

import smidgen as sm
from smidgen.delta.attaching import attach, remove
from smidgen.ports.attachment_record import trained_parameters
from smidgen.testing.cases import shake

RECIPES = ("LN()", "LoRA()", "Prefix()")
LABELS = {0: "no", 1: "yes"}
INPUTS = {"input_ids": torch.arange(1000, 1032).view(2, 16)}


def load():
    """MiniLM with a head of two labels."""
    from transformers import AutoModelForSequenceClassification

    from smidgen.inference.builtin_models import BUILTIN

    folder, _ = BUILTIN["minilm"]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(folder, id2label=LABELS).eval()


def made(model, recipe, seed):
    attach(model, recipe)
    shake(trained_parameters(model).values(), 0.05, seed)
    return sm.detach(model)


def milliseconds(steps, repeats):
    """Median processor time of each of the calls, which are made in turns; the first round is not counted."""
    times = {name: [] for name in steps}
    for round in range(repeats + 1):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            if round:
                times[name].append(1e3 * (time.process_time() - begin))
    return {name: statistics.median(found) for name, found in times.items()}


@torch.no_grad()
def logits(model):
    return model(**INPUTS).logits


def check(deltas):
    """Every switch, from and to each, gives what a fresh attachment gives."""
    expected = {None: logits(deltas.model)}
    for name, delta in deltas.items():
        with sm.attached(deltas.model, delta, verify=False):
            expected[name] = logits(deltas.model)
    for first in expected:
        for second in expected:
            deltas.use(first)
            deltas.use(second)
            if not torch.equal(logits(deltas.model), expected[second]):
                raise RuntimeError(f"{first!r} -> {second!r} does not give what {second!r} gives")
    deltas.use(None)


def ours(model, recipe, folder, repeats):
    """Milliseconds of each way to change to a delta of a recipe."""
    deltas = sm.Deltas(model)
    deltas["a"], deltas["b"] = (made(model, recipe, seed) for seed in (1, 2))
    deltas["other"] = made(model, "IA3()", 3)
    deltas["a"].save(folder)
    check(deltas)
    found = milliseconds(
        {"from the base": lambda: deltas.use("a"), "same recipe": lambda: deltas.use("b"),
         "another recipe": lambda: deltas.use("other"), "back to it": lambda: deltas.use("b"),
         "to the base": lambda: deltas.use(None)}, repeats
    )  # fmt: skip
    loading = {
        "load and attach, checked": lambda: attach(model, sm.Delta.load(folder)),
        "take off": lambda: remove(model),
        "load and attach, unchecked": lambda: attach(model, sm.Delta.load(folder), verify=False),
        "take off again": lambda: remove(model),
        "put in": lambda: deltas.update(c=folder),
    }
    return found | milliseconds(loading, repeats)


def theirs(folder, repeats):
    """LoRA in PEFT, with smidgen's rank and places; the head is switched too (modules_to_save)."""
    from peft import LoraConfig, get_peft_model

    def config():
        return LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])

    model = get_peft_model(load(), config(), adapter_name="a")
    model.add_adapter("b", config())
    for seed, name in enumerate("ab"):
        shake([p for n, p in model.named_parameters() if f".{name}." in n], 0.05, seed)
    model.eval()
    model.set_adapter("a")
    first = logits(model)
    model.set_adapter("b")
    if torch.equal(logits(model), first):
        raise RuntimeError("set_adapter changed nothing")
    model.save_pretrained(folder, selected_adapters=["a"])
    return milliseconds(
        {"set_adapter": lambda: model.set_adapter("a"), "back": lambda: model.set_adapter("b"),
         "load_adapter": lambda: model.load_adapter(f"{folder}/a", "c"),
         "delete_adapter": lambda: model.delete_adapter("c")}, repeats
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", default="benchmarks/results/switch.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, rows = load(), {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in RECIPES:
            rows[recipe] = ours(model, recipe, f"{folder}/{recipe}", options.repeats)
        rows["LoRA in PEFT"] = theirs(f"{folder}/peft", options.repeats)
    for name, found in rows.items():
        print(name, *(f"  {what:28}{value:8.2f} ms" for what, value in found.items()), sep="\n")
    write(options.out, {"options": vars(options), "milliseconds": rows, **describe()})


if __name__ == "__main__":
    main()
