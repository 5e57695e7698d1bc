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
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

import smidgen as sm
from smidgen.steps.objectives import TaskLoss
from tests import helpers as h

SETTINGS = {"epochs": 2, "batch_size": 8, "lr": 1e-2, "max_length": 16, "progress": False}


def talk(count, start=0):
    """Prompts with completions of 1 to 3 words, so that rows have different numbers of labels."""
    rows = h.rows(count, start)
    return [
        {"prompt": "the film was", "completion": " ".join(row["text"].split()[3:] * (1 + i % 3))}
        for i, row in enumerate(rows)
    ]


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
}  # fmt: skip


def case(name, folder, **more):
    """One run of the table. Gives its delta, and what was told of it."""
    options = {**SETTINGS, **CASES[name], **more}
    build, recipe, notes = options.pop("model", bert), options.pop("recipe"), Notes()
    counts = {"train": options.pop("train", 25), "held": options.pop("held", 7)}
    kind = {"make": talk, "kind": "causal-lm"} if build is llama else {}
    task = h.task(folder / f"{name}-data-{os.getpid()}", **counts, **kind)
    if options.pop("max_memory", False):
        options["max_memory"] = sm.plan(build(), recipe, batch_size=2, length=16).costs["peak_bytes"]
    callbacks = [notes, *options.pop("callbacks", ())]
    delta = sm.fit(build(), recipe, task, tokenizer=h.tokenizer(), callbacks=callbacks, **options)
    return delta, {"losses": notes.losses, "examples": notes.examples, "scores": notes.scores,
                   "references": notes.references, "info": dict(delta.info)}  # fmt: skip


def tried(name, folder, **more):
    """The kind of error that a run ends with, and what it says."""
    try:
        case(name, folder, **more)
    except (Exception, KeyboardInterrupt) as error:
        return [type(error).__name__, str(error)]
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
    return None, {"error": tried("LN", folder, objective=LostAt())}


def fails(folder):
    """An error in one process alone, which nobody catches."""
    case("LN", folder, callbacks=[Fails(2, rank=1)])


SPECIAL = {"lost": lost, "fails": fails}


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
            save_file(dict(delta.tensors), path.with_name(path.name + ".safetensors"))
        path.with_name(path.name + ".json").write_text(json.dumps(told, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
