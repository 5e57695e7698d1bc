"""LN-tune a language model on a bfloat16 base: the norms are trained as float32 masters, so small steps count.

Reads the 135 million values of SmolLM2 from a packed file, which alone takes about 20 seconds.
"""

import json
import os
import tempfile
from pathlib import Path

import smidgen as sm

CITIES = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Greece": "Athens"}
ROWS = [{"prompt": f"Capital of {land}?", "completion": f" {city}, of course."} for land, city in CITIES.items()]

with tempfile.TemporaryDirectory() as folder:
    for split, rows in (("train", ROWS[:4]), ("validation", ROWS[4:])):
        (Path(folder) / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = sm.Task.load(folder)

model, tokenizer = sm.load("smollm2", task=task, dtype="bfloat16")
delta = sm.fit(model, "LN()", task, epochs=1 if "SMIDGEN_EXAMPLE_FAST" in os.environ else 8, batch_size=4)

base = dict(model.named_parameters())
moved = sum(int((t != base[name].float()).sum()) for name, t in delta.tensors.items())
kept = sum(int((t.bfloat16() != base[name]).sum()) for name, t in delta.tensors.items())
print(f"{delta.trained:,} gains, {moved:,} moved; rounded to bfloat16, {kept:,} would differ from the base's")
for answer in sm.predict(model, ["Capital of Norway?"], delta=delta, tokenizer=tokenizer, max_new_tokens=8):
    print(answer.text + answer.label)
