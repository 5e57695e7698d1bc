"""The same under transformers.Trainer: its own optimiser would move norms at 5e-5, so it is handed one."""

import os
import tempfile

from transformers import Trainer, TrainingArguments

import smidgen as sm

FAST = "SMIDGEN_EXAMPLE_FAST" in os.environ
LIMIT = {"train": 28, "validation": 8} if FAST else {"train": 320, "validation": 60}
LENGTH = 16 if FAST else 64

task = sm.Task.load("bbc-news", limit=LIMIT)
model, tokenizer = sm.load("minilm", task=task)
sm.attach(model, "LN()")
sm.print_trainable_parameters(model)

with tempfile.TemporaryDirectory() as folder:
    options = TrainingArguments(
        folder, num_train_epochs=1 if FAST else 3, per_device_train_batch_size=4 if FAST else 16, logging_steps=10,
        eval_strategy="epoch", save_strategy="epoch", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model,
        options,
        train_dataset=task.encode(tokenizer, "train", max_length=LENGTH),
        eval_dataset=task.encode(tokenizer, "validation", max_length=LENGTH),
        data_collator=task.collator(tokenizer),
        optimizers=(sm.optimizer(model, lr=3e-3), None),
        callbacks=[sm.TrainerCallback()],
    )
    trainer.train()

delta = sm.detach(model)  # the model is the base again, bit for bit
print(delta)
