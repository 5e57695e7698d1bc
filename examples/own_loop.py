"""A training loop of one's own: attach, an optimiser, steps, and what is attached as a delta."""

import os

from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

import smidgen as sm

FAST = "SMIDGEN_EXAMPLE_FAST" in os.environ

task = sm.Task.load("bbc-news", limit={"train": 32 if FAST else 320, "test": 8 if FAST else 100})
model, tokenizer = sm.load("minilm", task=task)
rows = task.encode(tokenizer, "train", max_length=64)
batches = DataLoader(rows, batch_size=16, shuffle=True, collate_fn=task.collator(tokenizer))

sm.attach(model, "LN(layers='top:3') + BitFit(norms=False, layers='top:3')")
model.train()
adam = sm.optimizer(model)  # AdamW: each method at its own rate, the head at 1e-3, no decay
trained = [p for p in model.parameters() if p.requires_grad]
for epoch in range(1 if FAST else 3):
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        clip_grad_norm_(trained, 1.0)
        adam.step()
        adam.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.3f}")

delta = sm.Delta.of(model, note="own loop")  # a copy; the model stays attached
sm.detach(model)
print(delta)
print(sm.evaluate(model, task, delta=delta, max_length=64).values)
