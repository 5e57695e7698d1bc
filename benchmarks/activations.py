"""Bytes that a training step saves for its backward pass, for each method, on the shape of MiniLM.

python benchmarks/activations.py

Six layers of width 384 over 2,000 tokens, batch 8 x 64, sdpa, no dropout, no padding, a linear head on the first token.
What autograd saves is counted by torch.autograd.graph.saved_tensors_hooks: each storage once, storages of parameters
apart. It depends on shapes alone: the weights are random, and any machine counts the same. MB are 2^20 bytes.

`reference` was counted without this library, on hand-written edits of the same model. It agrees to the digit but for
the adapter: the reference's stands behind the block's last norm, ours before it, so that the lowest norm's input is
saved as well (0.75 MB). `after_the_block` gives the reference's figure.
"""

import argparse

import torch
import torch.nn.functional as F
from environment import describe, write
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertPreTrainedModel

import smidgen as sm

SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
BATCH, LENGTH, VOCABULARY = 8, 64, 2000
PFEIFFER = "Adapter(site='feed_forward', width=24, activation='relu')"
REFERENCE = {
    "Full()": 73.7,
    "BitFit()": 46.7,
    "LoRA(rank=8)": 50.6,
    "LoRA(rank=8, layers='top:3')": 25.7,
    "LoRA(rank=8, layers='top:1')": 9.1,
    PFEIFFER: 43.2,
    "IA3()": 72.9,
    "Head()": 0.75,
}
OTHERS = (
    "LN()",
    "LN(layers='top:2')",
    "LN(layers='top:1')",
    "LN() | Select('magnitude', keep=0.1)",
    "Prefix()",
    "PromptTuning()",
    "SSF()",
    "SSF(norms=False, target=('query', 'value'))",
    "DoRA(rank=8)",
    "PiSSA(rank=8)",
    "Adapter(width=24)",
    "Adapter(width=24, form='parallel')",
    "MAM",
    "Houlsby",
    "Pfeiffer",
    "UnifiedLN",
)


class Probe(BertPreTrainedModel):
    """BERT with a linear head on its first token and no pooler."""

    def __init__(self, config):
        super().__init__(config)
        self.bert, self.classifier = BertModel(config, add_pooling_layer=False), nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids):
        return self.classifier(self.bert(input_ids=input_ids).last_hidden_state[:, 0])


def build(layers=6, **sizes):
    """A model with nothing attached."""
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "sdpa"}
    sizes = {**SIZES, "vocab_size": VOCABULARY, **sizes, "num_hidden_layers": layers}
    return Probe(BertConfig(**sizes, **drops))


def saved(model, batch=BATCH, length=LENGTH):
    """Size in bytes -> number of storages of that size that one forward pass saves, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(torch.zeros(batch, length, dtype=torch.long)).sum()
    sizes = [storage.nbytes() for storage in found.values()]
    loss.backward()
    return {size: sizes.count(size) for size in sorted(set(sizes), reverse=True)}


def total(sizes):
    return sum(size * number for size, number in sizes.items())


def measure(recipe):
    """One method: trained values and what is saved."""
    model = build()
    sm.attach(model, recipe)
    sizes = saved(model)
    blind = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not blind, f"{recipe}: no gradient for {blind[:2]}"
    return {"recipe": recipe, "trained": sm.detach(model).trained, "bytes": total(sizes), "storages": sizes}


def after_the_block():
    """The adapter of the reference, by hand: a residual function of what leaves each block."""
    model, width = build().requires_grad_(False), SIZES["hidden_size"]
    model.classifier.requires_grad_(True)
    for layer in model.bert.encoder.layer:
        layer.down, layer.up = nn.Linear(width, 24), nn.Linear(24, width)
        layer.register_forward_hook(lambda m, args, output: output + m.up(F.relu(m.down(output))))
    return total(saved(model))


def show(row):
    reference = f"{row['reference']:9.2f}" if row["reference"] is not None else " " * 8 + "-"
    print(
        f"{row['recipe']:62} {row['trained']:>10,} {row['bytes']:>12,} {row['bytes'] / 2**20:8.2f} {reference}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/results/activations.json")
    options = parser.parse_args()
    print(f"{'':62} {'trained':>10} {'bytes':>12} {'MB':>8} {'reference':>9}")
    rows = []
    for recipe in (*REFERENCE, *OTHERS):
        rows.append({**measure(recipe), "reference": REFERENCE.get(recipe)})
        show(rows[-1])
    behind = after_the_block()
    print(f"{'an adapter behind the block, as in the reference':73} {behind:>12,} {behind / 2**20:8.2f}      43.20")
    shape = {**SIZES, "vocab_size": VOCABULARY, "batch": BATCH, "length": LENGTH}
    write(options.out, {"shape": shape, "rows": rows, "after_the_block": behind, **describe()})


if __name__ == "__main__":
    main()
