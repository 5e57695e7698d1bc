"""Tuning over a quantised SmolLM2-135M: memory, speed, what is lost to quantisation and what a start wins back.

python benchmarks/quantised.py --data ../shared/data/lm/tinyshakespeare.txt --out benchmarks/results/quantised.json

Every arm of memory and speed is a process of its own; arms take turns. All take the same loop: forward, backward, AdamW
over what is trained, on the same token ids, SDPA attention, no recomputation. `weights` are the bytes that the base
stores, `grown` what the resident set grows by at most in three steps behind two on a tiny batch (MALLOC_MMAP_THRESHOLD_
as in memory.py), `peak` their sum. PEFT stands on the very model that ours stands on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from environment import describe, write
from memory import THRESHOLD, peak, start

import smidgen as sm
from smidgen.sites.quantised.maps import own_weight, quantised_maps, stored_bytes

ARMS = {  # library, recipe, scheme
    "smidgen LN() bf16": ("smidgen", "LN()", "none"),
    "smidgen LN() nf4": ("smidgen", "LN()", "nf4"),
    "smidgen LN() nf4-double": ("smidgen", "LN()", "nf4-double"),
    "smidgen LN() int8": ("smidgen", "LN()", "int8"),
    "smidgen LN() torchao-int8": ("smidgen", "LN()", "torchao-int8"),
    "smidgen LN() torchao-int4": ("smidgen", "LN()", "torchao-int4"),
    "smidgen LoRA() nf4": ("smidgen", "LoRA()", "nf4"),
    "peft LN bf16": ("peft", "LN", "none"),
    "peft LN nf4": ("peft", "LN", "nf4"),
    "peft LoRA nf4": ("peft", "LoRA", "nf4"),
}
SHAPES = ((1, 16), (1, 128), (4, 128))
RATIOS = {  # the figure, what it is over, the aim
    "LN() on nf4 over LN() on bf16": ("smidgen LN() nf4", "smidgen LN() bf16", 0.45),
    "LN() on nf4 over PEFT's LoRA on nf4": ("smidgen LN() nf4", "peft LoRA nf4", 0.6),
}


def load(scheme):
    return sm.load("smollm2", dtype="bfloat16", quantize=scheme)


def prepare(model, library, recipe):
    """The model with a recipe of a library attached, and what is trained."""
    if library == "smidgen":
        sm.attach(model, recipe)
    else:
        import peft

        norms = [name for name, _ in model.named_modules() if name.endswith("norm")]
        config = (
            peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=norms)
            if recipe == "LN"
            else peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        )
        model = peft.get_peft_model(model, config)
    return model.train(), [p for p in model.parameters() if p.requires_grad]


def steps(model, trained, size, length, count):
    """Training steps; seconds of each."""
    adam, taken = torch.optim.AdamW(trained, lr=1e-4), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(100, 40000, (size, length), generator=generator)
        begin = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        taken.append(time.perf_counter() - begin)
    return taken


def one(job):
    """An arm in a process of its own."""
    library, recipe, scheme = ARMS[job["arm"]]
    model, _ = load(scheme)
    weights = stored_bytes(model)
    model, trained = prepare(model, library, recipe)
    steps(model, trained, 1, 8, 2)
    if job["what"] == "speed":
        taken = steps(model, trained, *job["shape"], job["steps"])[1:]
        return {"tokens_per_second": job["shape"][0] * job["shape"][1] / statistics.median(taken)}
    found = {"weights": weights, "values": sum(p.numel() for p in trained), "grown": {}}
    for size, length in SHAPES:
        before = start("cpu")
        steps(model, trained, size, length, 3)
        found["grown"][f"{size}x{length}"] = peak("cpu") - before
    return found


def apart(**job):
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": THRESHOLD} if job["what"] == "memory" else {**os.environ}
    command = [sys.executable, "-W", "ignore", __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory(arms, found):
    """Shape -> arm -> bytes, beside those that were found before."""
    for arm in arms:
        row = apart(what="memory", arm=arm)
        for shape, grown in row.pop("grown").items():
            here = {**row, "grown": grown, "peak": row["weights"] + grown}
            found.setdefault(shape, {})[arm] = here
            print(f"{shape} {arm:28} weights {row['weights'] / 1e6:7.1f} peak {here['peak'] / 1e6:7.1f} MB", flush=True)
    return found


def ratios(rows):
    """Shape -> what is compared -> ratio of peaks, and the aim."""
    return {
        shape: {
            name: {"ratio": arms[top]["peak"] / arms[bottom]["peak"], "aim": aim}
            for name, (top, bottom, aim) in RATIOS.items()
            if top in arms and bottom in arms
        }
        for shape, arms in rows.items()
    }


def planned(schemes, shapes):
    """What `plan` estimates for LN(): scheme -> shape -> peak bytes, weights in."""
    found = {}
    for scheme in schemes:
        model, _ = load(scheme)
        costs = {f"{b}x{t}": sm.plan(model, "LN()", batch_size=b, length=t).costs for b, t in shapes}
        found[scheme] = {shape: {k: c[k] for k in ("weights_bytes", "peak_bytes")} for shape, c in costs.items()}
    return found


def speed(arms, repeats, shape, count):
    """Arm -> tokens per second, each repeat's."""
    found = {arm: [] for arm in arms}
    for repeat in range(repeats):
        for arm in arms[:: -1 if repeat % 2 else 1]:
            found[arm].append(apart(what="speed", arm=arm, shape=shape, steps=count)["tokens_per_second"])
            print(f"{arm:28} {found[arm][-1]:7.0f} tokens/s", flush=True)
    return {arm: {"median": statistics.median(rates), "all": rates} for arm, rates in found.items()}


def batches(text, tokenizer, size, length, count, skip=0):
    ids = tokenizer(text)["input_ids"]
    step = size * length
    return [torch.tensor(ids[(skip + i) * step : (skip + i + 1) * step]).view(size, length) for i in range(count)]


@torch.no_grad()
def measured(model, held):
    """Mean loss, and the logits."""
    model.eval()
    outputs = [model(input_ids=ids, labels=ids) for ids in held]
    return statistics.mean(o.loss.item() for o in outputs), torch.cat([o.logits.float() for o in outputs])


def apart_by(one, other):
    """Mean absolute and root mean square difference of logits, and how often the likeliest token is another."""
    difference = one - other
    return {
        "mean": difference.abs().mean().item(),
        "rms": difference.pow(2).mean().sqrt().item(),
        "other_token": (one.argmax(-1) != other.argmax(-1)).float().mean().item(),
    }


def moved(text, schemes, recipe, count):
    """Trained on a quantised base, then put on the 16-bit base of the same weights, and the other way round."""
    plain, tokenizer = load("none")
    train, held = batches(text, tokenizer, 4, 64, count), batches(text, tokenizer, 4, 64, 6, skip=count)
    loss16, logits16 = measured(plain, held)
    found = {"recipe": recipe, "steps": count, "loss on bf16": loss16}
    for scheme in schemes:
        model, _ = load(scheme)
        base = measured(model, held)
        sm.attach(model, recipe, seed=0)
        model.train()
        rate = 1e-3 if "LoRA" in recipe else 3e-3
        adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        for ids in train:
            model(input_ids=ids, labels=ids).loss.backward()
            adam.step()
            adam.zero_grad(set_to_none=True)
        tuned = measured(model, held)
        delta = sm.detach(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sm.RebasedWarning)
            there = sm.rebase(delta, plain)
        with sm.attached(plain, there):
            on16 = measured(plain, held)
        found[scheme] = {
            "loss of the base": base[0], "loss tuned": tuned[0], "loss on bf16": on16[0],
            "base against bf16": apart_by(base[1], logits16), "tuned against rebased": apart_by(tuned[1], on16[1]),
        }  # fmt: skip
        print(scheme, json.dumps(found[scheme]), flush=True)
    return found


def starts(schemes, ranks):
    """Mean over the maps of |W - Q - s B A| over |W|: no product, LoftQ after 1 to 5 steps, begun as QPiSSA."""
    plain, _ = load("none")
    weights = {path: m.weight.detach().float() for path, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    found = {}
    for scheme in schemes:
        for rank in ranks:
            row = {}
            for begin in ("zero", "pissa"):
                model, _ = load(scheme)
                alone = {path: own_weight(module) for path, module, _ in quantised_maps(model)}
                row["no product"] = statistics.mean(
                    ((weights[p] - w).norm() / weights[p].norm()).item() for p, w in alone.items()
                )
                recipe = sm.LoftQ(rank=rank, target="linear", layers="bottom:3")
                errors = list(sm.requantise(model, recipe, steps=5, start=begin).values())
                row[begin] = [statistics.mean(each[i] for each in errors) for i in range(6)]
            found[f"{scheme} rank {rank}"] = row
            print(scheme, rank, json.dumps(row), flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job")
    parser.add_argument("--data", default="../shared/data/lm/tinyshakespeare.txt")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantised.json"))
    parser.add_argument("--parts", nargs="+", default=["memory", "planned", "speed", "moved", "starts"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(one(json.loads(options.job))))
        return
    done = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for part in options.parts:
        if part == "memory":
            for arm in options.arms:
                done["memory"] = memory([arm], done.get("memory", {}))
                done["ratios"] = ratios(done["memory"])
                write(options.out, {**done, **describe()})
        elif part == "planned":
            done["planned"] = planned(("none", "nf4"), SHAPES)
        elif part == "speed":
            arms = ["smidgen LN() nf4", "peft LN nf4", "smidgen LN() bf16", "peft LN bf16"]
            done["speed"] = {"shape": [4, 64], **speed(arms, options.repeats, (4, 64), options.steps)}
        elif part == "moved":
            text = Path(options.data).read_text()
            done["moved"] = [moved(text, ("nf4", "torchao-int8"), recipe, 30) for recipe in ("LN()", "LoRA()")]
        else:
            done["starts"] = starts(("nf4",), (8, 32))
        write(options.out, {**done, **describe()})


if __name__ == "__main__":
    main()
