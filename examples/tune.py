"""Tune the LayerNorms of MiniLM on part of BBC news, measure on the test split, save, load, predict."""

import os
import tempfile

import smidgen as sm

FAST = "SMIDGEN_EXAMPLE_FAST" in os.environ
LIMIT = {"train": 24, "validation": 8, "test": 8} if FAST else {"train": 320, "validation": 60, "test": 200}

task = sm.Task.load("bbc-news", limit=LIMIT)
model, tokenizer = sm.load("minilm", task=task)
plan = sm.plan(model, "LN()", batch_size=16, length=64)
print(f"{plan.recipe}: {plan.trained:,} of {plan.pretrained:,} values, head apart {plan.head_values:,}")

delta = sm.fit(model, "LN()", task, epochs=1 if FAST else 3, batch_size=16, max_length=32 if FAST else 64)
print(sm.evaluate(model, task, delta=delta).values)

with tempfile.TemporaryDirectory() as folder:
    delta.save(folder)
    print({name: os.path.getsize(f"{folder}/{name}") for name in sorted(os.listdir(folder))})
    delta = sm.Delta.load(folder)

texts = ["The striker scored twice in extra time.", "Shares fell sharply after the bank's results."]
for row in sm.predict(model, texts, delta=delta, tokenizer=tokenizer):
    print(f"{row.label:<14} {row.probabilities[row.label]:.2f}  {row.text}")
