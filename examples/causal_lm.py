"""LN-tune a language model on a bfloat16 base: the norms are trained as float32 masters, so small steps count."""

import json
import os
import tempfile
from pathlib import Path

import smidgen as sm
from smidgen.demo import predict

FAST = "SMIDGEN_EXAMPLE_FAST" in os.environ
PAIRS = {
    "Capital of France?": " Paris, of course.",
    "Capital of Italy?": " Rome, of course.",
    "Capital of Spain?": " Madrid, of course.",
    "Capital of Japan?": " Tokyo, of course.",
}

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "train.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in PAIRS.items()))
    task = sm.Task.load(file, validation=0)

model, tokenizer = sm.load("smollm2", task=task, dtype="bfloat16")  # 135 million values
delta = sm.fit(model, "LN()", task, epochs=1 if FAST else 10, batch_size=4, lr=3e-3)

base = dict(model.named_parameters())
moved = sum(int((t != base[name].float()).sum()) for name, t in delta.tensors.items())
kept = sum(int((t.bfloat16() != base[name]).sum()) for name, t in delta.tensors.items())
print(f"{delta.trained:,} float32 values, {moved:,} moved; rounded to bfloat16, {kept:,} would differ from the base")
for answer in predict(model, ["Capital of Greece?"], delta=delta, tokenizer=tokenizer, max_new_tokens=8):
    print(answer.text + answer.label)
