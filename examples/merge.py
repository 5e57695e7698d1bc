"""Fold a delta into its base and save a plain model: transformers reads it without this library."""

import os
import tempfile

import torch
from transformers import AutoModelForSequenceClassification

import smidgen as sm

FAST = "SMIDGEN_EXAMPLE_FAST" in os.environ

task = sm.Task.load("bbc-news", limit={"train": 16 if FAST else 160, "validation": 8})
model, tokenizer = sm.load("minilm", task=task)
delta = sm.fit(model, "LN() + LoRA(rank=4)", task, epochs=1, batch_size=8, max_length=32)

batch = tokenizer(["Parliament votes on the budget today."], return_tensors="pt")
with sm.attached(model, delta), torch.no_grad():
    attached = model(**batch).logits  # (1, 5)

with tempfile.TemporaryDirectory() as folder:
    sm.merge(model, delta).save_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
with torch.no_grad():
    merged = plain(**batch).logits
print(f"{type(plain).__name__}, largest difference {float((merged - attached).abs().max()):.1e}")
