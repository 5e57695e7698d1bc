"""Does LN-tuning train on a bfloat16 base? smidgen and HF PEFT in one script: SmolLM2-135M on tinyshakespeare.

python benchmarks/bf16.py --text ../shared/data/lm/tinyshakespeare.txt
"""

import argparse
import time
import warnings
from pathlib import Path

import torch
from environment import describe, write

import smidgen as sm


def batches(tokenizer, path, length, count, size):
    ids = tokenizer(Path(path).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    blocks = ids[: len(ids) // length * length].view(-1, length)
    order = torch.randperm(len(blocks) - 16, generator=torch.Generator().manual_seed(0))
    train = [blocks[order[i * size : (i + 1) * size]] for i in range(count)]
    return train, blocks[-16:]


@torch.no_grad()
def loss_of(model, held):
    model.eval()
    losses = [model(input_ids=rows, labels=rows).loss.item() for rows in held.split(4)]
    return sum(losses) / len(losses)


def train(model, optimizer, data, held):
    before, begin = loss_of(model, held), time.perf_counter()
    model.train()
    for rows in data:
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"loss_before": before, "loss_after": loss_of(model, held), "seconds": time.perf_counter() - begin}


def moved(parameters, start):
    return sum(int((p.detach() != s).sum()) for p, s in zip(parameters, start, strict=True))


def with_smidgen(model, lr, data, held):
    sm.attach(model, "LN()")
    optimizer = sm.optimizer(model, lr=lr)
    parameters = optimizer.param_groups[0]["params"]
    start = [p.detach().clone() for p in parameters]
    result = train(model, optimizer, data, held)
    result |= {"moved": moved(parameters, start), "values": sum(p.numel() for p in parameters)}
    sm.detach(model)
    return result


def with_peft(model, lr, data, held):
    from peft import LNTuningConfig, get_peft_model

    names = ["input_layernorm", "post_attention_layernorm", "model.norm"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LNTuningConfig(task_type="CAUSAL_LM", target_modules=names))
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    result = train(wrapped, torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0), data, held)
    result |= {"moved": moved(parameters, start), "values": sum(p.numel() for p in parameters)}
    wrapped.unload()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lrs", default="1e-4,1e-3")
    parser.add_argument("--out", default="benchmarks/results/bf16.json")
    options = parser.parse_args()
    model, tokenizer = sm.load("smollm2", dtype="bfloat16")
    data, held = batches(tokenizer, options.text, options.length, options.steps, options.batch_size)
    rows = []
    for lr in map(float, options.lrs.split(",")):
        for name, arm in (("HF PEFT LN_TUNING", with_peft), ("smidgen LN()", with_smidgen)):
            rows.append({"arm": name, "lr": lr, **arm(model, lr, data, held)})
            r = rows[-1]
            print(
                f"{name:18} lr {lr:g}: {r['moved']:,} of {r['values']:,} values moved, loss {r['loss_before']:.3f} -> "
                f"{r['loss_after']:.3f}, {r['seconds']:.0f} s",
                flush=True,
            )
    write(options.out, {"options": vars(options), "rows": rows, **describe()})


if __name__ == "__main__":
    main()
