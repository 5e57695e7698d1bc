"""Runs of `fit` that are the same in one process and in several: started by test_launch.py, here or by accelerate.

As a program, `python -m tests.launched FOLDER CASE...` runs cases one after another and writes what each process found.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as T
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import smidgen as sm
from smidgen.efficiency.sharded_base import ShardedBase
from smidgen.methods.base import Method
from smidgen.ports.attachment_record import trained_parameters
from smidgen.recipe.recipe import Term
from smidgen.steps.objectives import TaskLoss
from tests import helpers as h
from tests.odd_layouts import odd, output

SETTINGS = {"epochs": 2, "batch_size": 8, "lr": 1e-2, "max_length": 16, "progress": False}


def talk(count, start=0):
    """Prompts with completions of 1 to 3 words, so that rows have different numbers of labels."""
    rows = h.rows(count, start)
    return [
        {"prompt": "the film was", "completion": " ".join(row["text"].split()[3:] * (1 + i % 3))}
        for i, row in enumerate(rows)
    ]


def gpt2():
    return h.causal("gpt2", embd_pdrop=0, attn_pdrop=0, resid_pdrop=0).double()


def tied():
    return h.causal("llama", tie_word_embeddings=True).double()


def albert():
    none = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"), 0)
    return h.build("albert", **none).double()


def bert(**options):
    return h.bert(**options).double()


def llama():
    return h.causal("llama").double()


@dataclass(frozen=True)
class SumLoss(TaskLoss):
    """A sum over examples."""

    reduction = "sum"

    def loss(self, step):
        return super().loss(step) * len(step.batch["labels"])


@dataclass(frozen=True)
class LostAt(TaskLoss):
    """No number from a step on, in the last of several processes alone."""

    number: int = 2

    def loss(self, step):
        last = Accelerator().is_last_process
        return super().loss(step) * (float("nan") if last and step.number == self.number else 1.0)


class Notes(sm.Callback):
    """What a run told of itself."""

    def __init__(self):
        self.losses, self.examples, self.scores, self.references = [], [], [], []

    def on_step(self, run):
        self.losses.append(run.loss)
        self.examples.append(run.examples)

    def on_validation(self, run, scores):
        self.scores.append(scores.values)
        self.references.append([reference if isinstance(reference, int) else None for reference in scores.references])


class Resident(sm.Callback):
    """How much of a base a process holds while it is in shards, behind a step."""

    def __init__(self, base):
        self.base, self.values = base, {}

    def on_step(self, run):
        trained = {id(p) for p in trained_parameters(run.model).values()}
        shards = [p for p in run.model.parameters() if isinstance(p, DTensor)]
        self.values = {
            "in shards": sum(p.numel() for p in shards),
            "of them here": sum(p.to_local().numel() for p in shards),
            "whole": sum(p.numel() for p in run.model.parameters() if not isinstance(p, DTensor)),
            "trained": sum(p.numel() for p in trained_parameters(run.model).values()),
            "trained in shards": sum(id(p) in trained for p in shards),
            "left in the base": sum(p.numel() for p in self.base.parameters()),
        }


class Fails(sm.Callback):
    """Raises after a step, in every process or in one alone."""

    def __init__(self, step, rank=None):
        self.step, self.rank = step, rank

    def on_step(self, run):
        if run.step == self.step and self.rank in (None, Accelerator().process_index):
            raise RuntimeError("on purpose")


class Interrupted(sm.Callback):
    """Ctrl-C after a step, in the last process alone."""

    def __init__(self, step):
        self.step = step

    def on_step(self, run):
        if run.step == self.step and Accelerator().is_last_process:
            os.kill(os.getpid(), signal.SIGINT)


# 25 examples in batches of 8: the last one has a single row, so one of two processes has none of it.
CASES = {
    "LN": {"recipe": "LN()"},
    "LoRA": {"recipe": "LoRA(rank=2) + LN()"},
    "two parts": {"recipe": "LN()", "held": 1, "max_memory": True},
    "growth": {"recipe": "TriAdaptLoRA(rank=4, growth=1, orthogonality=0.5) + LN()"},
    "sum": {"recipe": "LN()", "objective": SumLoss(), "lr": 1e-3},
    "causal": {"recipe": "LN()", "model": llama},
    "causal LoRA": {"recipe": "LoRA(rank=2) + LN()", "model": llama},
    "causal by length": {"recipe": "LN()", "model": llama, "batch_tokens": 32},
    "packed": {"recipe": "LN()", "model": llama, "batching": "pack", "batch_size": 3, "train": 22},
    "chosen": {"recipe": "LN() | Select('fisher', keep=0.5)"},
    "close": {"recipe": "LN()", "objective": sm.StayClose(weight=0.3)},
    "recomputed": {"recipe": "LoRA(rank=2) + LN()", "model": llama, "recompute": True},
    "tied": {"recipe": "LoRA(rank=2) + LN()", "model": tied},
    "gpt2": {"recipe": "LoRA(rank=2) + LN()", "model": gpt2},
    "albert": {"recipe": "LoRA(rank=2) + LN()", "model": albert},
}  # fmt: skip


def case(name, folder, **more):
    """One run of the table. Gives its delta, and what was told of it."""
    options = {**SETTINGS, **CASES[name], **more}
    build, recipe, notes = options.pop("model", bert), options.pop("recipe"), Notes()
    model = build()
    resident, before = Resident(model), h.twin(model).state_dict()
    own = {key: id(parameter) for key, parameter in model.named_parameters()}
    counts = {"train": options.pop("train", 25), "held": options.pop("held", 7)}
    kind = {"make": talk, "kind": "causal-lm"} if build in CAUSAL else {}
    task = h.task(folder / f"{name}-data-{os.getpid()}", **counts, **kind)
    if options.pop("max_memory", False):
        options["max_memory"] = sm.plan(build(), recipe, batch_size=2, length=16).costs["peak_bytes"]
    callbacks = [notes, resident, *options.pop("callbacks", ())]
    try:
        delta = sm.fit(model, recipe, task, tokenizer=h.tokenizer(), callbacks=callbacks, **options)
    finally:
        values = model.state_dict()
        LEFT[name] = all(torch.equal(values[key], value) for key, value in before.items())
    LEFT[name] &= own == {key: id(parameter) for key, parameter in model.named_parameters()}
    with sm.attached(model, delta):
        wanted = h.logits(model)
    merged = h.logits(sm.merge(model, delta)) if recipe in MERGED else wanted
    return delta, {
        "losses": notes.losses, "examples": notes.examples, "scores": notes.scores, "references": notes.references,
        "best": delta.info["best_epoch"], "base": delta.base.to_json(), "left": LEFT[name],
        "resident": resident.values, "merged": float((merged - wanted).abs().max()),
    }  # fmt: skip


def every(folder):
    """Every method of the registry."""
    methods = [cls(**FEW.get(name, {})) for name, cls in sorted(Term.registry.items()) if issubclass(cls, Method)]
    found = {}
    for method in methods:
        delta, _ = case("LN", folder, recipe=str(method), train=5, held=2, epochs=1, batch_size=4)
        found |= {f"{method}: {key}": tensor for key, tensor in delta.tensors.items()}
    return found, {"left": LEFT["LN"], "methods": [str(method) for method in methods]}


def clip():
    """Two towers, and a single number beside them."""
    text = {**h.SIZES, "vocab_size": 61, "max_position_embeddings": 20, **h.TOKENS}
    towers = {"text_config": text, "vision_config": {**h.SIZES, "image_size": 8, "patch_size": 4}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T.CLIPModel(T.CLIPConfig(**towers, projection_dim=8)).eval().double()
    pixels = torch.arange(192.0, dtype=torch.float64).view(1, 3, 8, 8) / 192
    return model, lambda model: model(input_ids=torch.tensor([[5, 6, 7, 3]]), pixel_values=pixels).logits_per_image


def laid_out(name):
    """A model with a layout of its own, and what runs it."""
    return odd(name), lambda model: output(model, name)


def gradients(model, run):
    """Name -> gradient of what is trained, in a second pass over the same inputs."""
    for _ in range(2):
        model.zero_grad()
        run(model).double().square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in trained_parameters(model).items()}


def layouts(folder):
    """The largest difference between gradients beside a base in shards and beside a whole one, for each layout."""
    found = {}
    for name in LAYOUTS:
        model, run = clip() if name == "clip" else laid_out(name)
        whole = sm.attach(h.twin(model), "LN() + LoRA(rank=2)")
        base = ShardedBase(model, torch.device("cpu"), Accelerator().num_processes)
        sm.attach(base.model, "LN() + LoRA(rank=2)")
        base.shard()
        one, other = gradients(whole, run), gradients(base.model, run)
        base.gather()
        found[name] = max(float((one[key] - other[key]).abs().max()) for key in one)
    return None, found


def tried(name, folder, **more):
    """The kind of error that a run ends with, and what it says."""
    try:
        case(name, folder, **more)
    except (Exception, KeyboardInterrupt) as error:
        return [type(error).__name__, str(error), *getattr(error, "__notes__", ())]
    return None


def resumed(name, folder):
    """A run that stops, by an error and by Ctrl-C at one process, and goes on; each process has an `out` of its own."""
    more = {"out": folder / f"{name}-run-{Accelerator().process_index}", "checkpoint_steps": 2}
    first = tried(name, folder, callbacks=[Fails(3)], **more)
    second = tried(name, folder, callbacks=[Interrupted(5)], **more)
    files = sorted(path.name for path in more["out"].glob("*"))
    delta, told = case(name, folder, **more)
    again, _ = case(name, folder, **more)
    h.same(delta, again)
    return delta, {**told, "first": first, "second": second, "files": files,
                   "end": sorted(path.name for path in more["out"].glob("*"))}  # fmt: skip


def lost(folder):
    """A loss that is no number in one process alone."""
    return None, {"error": tried("LN", folder, objective=LostAt()), "left": LEFT["LN"]}


def others(folder):
    """Another base, or other rows, in one process alone."""
    rank = Accelerator().process_index
    return None, {
        "base": tried("LN", folder, model=lambda: bert(seed=rank)),
        "rows": tried("LN", folder, train=25 - rank),
    }


def fails(folder):
    """An error in one process alone, which nobody catches."""
    case("LN", folder, callbacks=[Fails(2, rank=1)])


SPECIAL = {"lost": lost, "fails": fails, "every method": every, "others": others, "layouts": layouts}
LAYOUTS = ("clip", "bloom", "dbrx", "t5gemma", "zamba", "deepseek")
CAUSAL = (llama, tied, gpt2)
MERGED = ("LN()", "LoRA(rank=2) + LN()")
FEW = {"MoS": {"rank": 3}}  # the default needs three layers
LEFT = {}  # case -> whether its model was as before


def run(name, folder):
    """A case by its name; `X resumed` is a case X that is stopped and goes on."""
    if name in SPECIAL:
        return SPECIAL[name](folder)
    return resumed(name.removesuffix(" resumed"), folder) if name.endswith(" resumed") else case(name, folder)


def found(folder, name, rank):
    """What a process found: the delta's tensors, and what was told."""
    path = folder / f"{name}.{rank}"
    file = path.with_name(path.name + ".safetensors")
    return load_file(file) if file.exists() else None, json.loads(path.with_name(path.name + ".json").read_text())


def main(folder, names):
    torch.set_num_threads(1)
    for name in names:
        delta, told = run(name, folder)
        path = folder / f"{name}.{Accelerator().process_index}"
        if delta is not None:
            save_file(dict(getattr(delta, "tensors", delta)), path.with_name(path.name + ".safetensors"))
        path.with_name(path.name + ".json").write_text(json.dumps(told, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
