"""The arms of the speed benchmark: one training run of HF PEFT under Trainer, of a plain loop, or of smidgen."""

import contextlib
import itertools
import os
import statistics
import tempfile
import time

import peft
import torch
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback, TrainingArguments

import smidgen as sm
from smidgen.training.run.loop import Loop

BATCH, WARMUP = 32, 0.06
ARMS = {
    "peft LN": ("peft", "LN", {}),
    "peft LN grouped": ("peft", "LN", {"grouped": True}),
    "peft LN grouped bf16": ("peft", "LN", {"grouped": True, "bf16": True}),
    "peft LoRA": ("peft", "LoRA", {}),
    "peft LoRA grouped": ("peft", "LoRA", {"grouped": True}),
    "peft LoRA grouped bf16": ("peft", "LoRA", {"grouped": True, "bf16": True}),
    "torch full": ("torch", "Full", {}),
    "smidgen LN()": ("smidgen", "LN()", {}),
    "smidgen LN() fp32": ("smidgen", "LN()", {"dtype": "float32"}),
    "smidgen LN() | Select": ("smidgen", "LN() | Select('fisher', keep=0.1)", {"lr": 1e-2}),
    "smidgen LN(layers='top:2')": ("smidgen", "LN(layers='top:2')", {}),
    "smidgen LN(layers='top:2') fp32": ("smidgen", "LN(layers='top:2')", {"dtype": "float32"}),
    "smidgen LoRA()": ("smidgen", "LoRA()", {}),
}
LR = {"LN": 3e-3, "LoRA": 1e-3, "Full": 5e-5}


class Marks(TrainerCallback):
    """The time of each step's end."""

    def __init__(self):
        self.times = []

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.perf_counter())


def prepared(kind, model):
    if kind == "Full":
        return model
    common = {"task_type": peft.TaskType.SEQ_CLS}
    if kind == "LN":
        config = peft.LNTuningConfig(target_modules=["LayerNorm"], **common)
    else:
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], **common)
    return peft.get_peft_model(model, config)


def with_trainer(task, kind, options, epochs, seed, folder, max_length=None):
    """HF PEFT under Trainer: (model, seconds, seconds per epoch in the steady state)."""
    model, tokenizer = sm.load("minilm", task=task, seed=seed)
    rows = list(task.encode(tokenizer, "train", max_length=max_length))
    strategy = "group_by_length" if options.get("grouped") else "random"
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=BATCH, num_train_epochs=epochs, learning_rate=LR[kind], warmup_steps=WARMUP,
        lr_scheduler_type="linear", bf16=bool(options.get("bf16")), train_sampling_strategy=strategy, use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=seed, max_grad_norm=1.0,
        weight_decay=0.0,
    )  # fmt: skip
    marks = Marks()
    tuned = prepared(kind, model)
    trainer = Trainer(tuned, arguments, train_dataset=rows, data_collator=task.collator(tokenizer), callbacks=[marks])
    start = time.perf_counter()
    trainer.train()
    return tuned, tokenizer, time.perf_counter() - start, steady(marks.times, len(rows))


def with_torch(task, kind, options, epochs, seed, folder):
    """A plain loop over all parameters."""
    model, tokenizer = sm.load("minilm", task=task, seed=seed)
    rows, collate = task.encode(tokenizer, "train"), task.collator(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR[kind], weight_decay=0.0)
    steps = epochs * -(-len(rows) // BATCH)
    rise = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise + 1))
    )
    generator, times = torch.Generator().manual_seed(seed), []
    torch.manual_seed(seed)
    start = time.perf_counter()
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=generator).tolist()
        for first in range(0, len(order), BATCH):
            model(**collate([rows[i] for i in order[first : first + BATCH]])).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            times.append(time.perf_counter())
    return model, tokenizer, time.perf_counter() - start, steady(times, len(rows))


def with_smidgen(task, recipe, options, epochs, seed, folder):
    """sm.fit: (delta, ...). Validation is left out of the steady state, not of the seconds."""
    options = {"batching": "length", "dtype": "auto", **options}
    model, tokenizer = sm.load("minilm", task=task, seed=seed, dtype=options.pop("dtype"))
    if options.pop("gradient_below", False):
        model.enable_input_require_grads()
    times, plain = [], Loop._step

    def step(self, *args):
        begin = time.perf_counter()
        plain(self, *args)
        times.append((begin, time.perf_counter()))

    Loop._step = step
    try:
        start = time.perf_counter()
        delta = sm.fit(
            model, recipe, task, tokenizer=tokenizer, epochs=epochs, seed=seed, progress=False, warmup=WARMUP,
            batch_size=BATCH, **options,
        )  # fmt: skip
        seconds = time.perf_counter() - start
    finally:
        Loop._step = plain
    return (model, delta), tokenizer, seconds, steady_between(times, len(task.splits["train"]))


def steady(times, examples):
    """Seconds per epoch from the ends of its steps, the first five left out."""
    spans = [b - a for a, b in itertools.pairwise(times[4:])]
    return statistics.mean(spans) * -(-examples // BATCH)


def steady_between(times, examples):
    """The same, of (start, end); what lies between two steps counts, but not the validation between epochs."""
    each = -(-examples // BATCH)
    spans = [times[i][1] - times[i - 1][1] for i in range(5, len(times)) if i % each]
    return statistics.mean(spans) * each


HOW = {"peft": with_trainer, "torch": with_torch, "smidgen": with_smidgen}


def one(task, arm, epochs, seed=0):
    how, what, options = ARMS[arm] if isinstance(arm, str) else arm
    AcceleratorState._reset_state(True)  # Trainer's bf16 would stay on for whoever asks Accelerate next
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return HOW[how](task, what, options, epochs, seed, folder)
