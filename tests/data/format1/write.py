"""Wrote the deltas beside it, with the code of commit 261dedd; kept to say what they are, not run by any test.

git archive 261dedd src | tar -x -C /tmp/old && PYTHONPATH=/tmp/old/src python tests/data/format1/write.py
"""

import json
import os
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

import smidgen as sm

HERE = Path(__file__).resolve().parent
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
RECIPES = {
    "ln-select": "LN() | Select('magnitude', keep=0.25)",
    "lora-head": "LoRA(rank=2, target=('query', 'ff_out')) + Head()",
    "prefix-prompt": "Prefix(length=3) + PromptTuning(length=2)",
}


def main():
    os.chdir(HERE)  # the name of the base in a delta is the path that it was loaded from
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=24, max_position_embeddings=16, **SIZES)).eval()
    model.save_pretrained("base")
    ids = torch.randint(1, 24, (4, 6))
    found = {"input_ids": ids.tolist()}
    for name, recipe in RECIPES.items():
        model = BertForSequenceClassification.from_pretrained("base").eval()
        sm.attach(model, recipe, seed=1)
        optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(5):
            optimiser.zero_grad()
            model(ids, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
            optimiser.step()
        with torch.no_grad():
            found[name] = model(ids).logits.tolist()
        sm.detach(model).save(name)
    Path("expected.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
