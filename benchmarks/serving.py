"""Speed of serving: mixed batches of many deltas against the bare base, HF PEFT's mixed batches, one after another.

python benchmarks/serving.py --data ../shared/data/glue/sst2

MiniLM, batches of 32 sentences of SST-2, all rows of a batch with different deltas. Arms take turns within one run;
ratios are of medians. `outside` is the share of time that is not inside of the model, at full load. Then memory and
throughput by the number of deltas, the time to add one, and texts of SmolLM2-135M written by 16 deltas side by side and
one after another.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from environment import describe, write
from transformers.utils import logging

import smidgen as sm
from smidgen.inference.task_record import TaskRecord
from smidgen.serving.forward_batches import compute

logging.set_verbosity_error()
ROOT = Path(__file__).parents[1]
TASK = {"kind": "classification", "text": ["sentence"]}
ROWS = 32


def tenants(server, model, recipe, count, start=0):
    """Add so many deltas of a recipe with values of their own; seconds of each."""
    sm.attach(model, recipe)
    first = sm.detach(model).with_info(task=TASK)
    seconds, generator = [], torch.Generator().manual_seed(start)
    for i in range(start, start + count):
        noise = {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in first.tensors.items()}
        delta = replace(first, tensors=noise)
        begin = time.perf_counter()
        server.add(f"{recipe.split('(')[0]}{i}", delta)
        seconds.append(time.perf_counter() - begin)
    return seconds


def requests(server, names, sentences):
    """One request for each name, on a sentence each."""
    found = []
    for name, sentence in zip(names, sentences, strict=True):
        asked = server._asked(name)
        if asked.tenant is None:
            asked = replace(asked, task=TaskRecord("classification", ("text",), None))
        found += asked.requests({"text": [sentence]}, "logits")
    return found


def plain(model, served, batch):
    """The bare base on the examples of requests."""
    kind = batch[0].kind
    with torch.inference_mode():
        inputs, _ = kind.parted(served.collator(kind)([request.example for request in batch]))
        return model(**inputs).logits


def speeds(arms, repeats):
    """Name -> rows per second, medians over turns."""
    for call in arms.values():
        call()
    found = {name: [] for name in arms}
    for turn in range(repeats):
        for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
            begin = time.perf_counter()
            rows = arms[name]()
            found[name].append(rows / (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in found.items()}


def resident():
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def classifiers(args):
    """Throughput of mixed batches, memory, time to add."""
    task = sm.Task.load(args.data)
    sentences = [row["sentence"] for row in task.splits["validation"].select(range(ROWS * args.batches))]
    model, tokenizer = sm.load("minilm", task=task)
    sentences = sorted(sentences, key=lambda text: len(tokenizer(text)["input_ids"]))
    parts = [sentences[i : i + ROWS] for i in range(0, len(sentences), ROWS)]
    found = {}
    with sm.Server(model, processor=tokenizer) as server:
        adding = tenants(server, model, "LN()", 100)
        before = resident()
        adding += tenants(server, model, "LN()", 9900, 100)
        grown = (resident() - before) / 9900
        counts = {n: requests_of(server, parts, "LN", n) for n in (100, 10000)}
        both = {f"{n:,} deltas": lambda given=given: passed(given) for n, given in counts.items()}
        rates = speeds(both, args.repeats)
        file = saved_bytes(model)
        found["10,000 LN deltas"] = {
            "rows per second": rates,
            "10,000 over 100": rates["10,000 deltas"] / rates["100 deltas"],
            "bytes of memory a delta": grown,
            "bytes of a file": file,
            "memory over file": grown / file,
            "GiB of 10,000": grown * 10000 / 2**30,
        }
        print(found, file=sys.stderr)
        for i in range(1000, 10000):
            server.remove(f"LN{i}")
        lora = tenants(server, model, "LoRA(rank=8)", 1000)
        tenants(server, model, "Prefix(length=8)", 100)
        tenants(server, model, "Adapter(width=16)", 100)
        served = server.models.first
        batches = {
            "LN, 1,000 deltas": requests_of(server, parts, "LN", 1000),
            "LoRA rank 8, 1,000 deltas": requests_of(server, parts, "LoRA", 1000),
            "the base as a row": [requests(server, ["base"] * len(part), part) for part in parts],
            "Prefix, Adapter, LN and the base": [mix(server, part) for part in parts],
        }
        arms = {"bare base": lambda: sum(len(plain(model, served, b)) for b in batches["LN, 1,000 deltas"])}
        arms |= {name: lambda given=given: passed(given) for name, given in batches.items()}
        arms |= peft_arm(task, parts)
        rates = speeds(arms, args.repeats)
        base = rates["bare base"]
        found["rows per second"] = {n: {"rate": r, "of the base": r / base} for n, r in rates.items()}
        found["add a delta, ms"] = {
            "LN": 1e3 * statistics.median(adding), "LoRA rank 8": 1e3 * statistics.median(lora),
        }  # fmt: skip
        found["full load"] = full_load(server, parts)
    return found


def passed(batches):
    """Rows of mixed batches, computed."""
    return sum(len(compute(batch)) for batch in batches)


def saved_bytes(model):
    """Bytes of the safetensors file of LN() with its head."""
    import tempfile

    sm.attach(model, "LN()")
    delta = sm.detach(model)
    with tempfile.TemporaryDirectory() as folder:
        return (Path(delta.save(folder)) / "delta.safetensors").stat().st_size


def requests_of(server, parts, prefix, count):
    """Batches whose rows have different deltas, spread over all."""
    place, found = 0, []
    for part in parts:
        names = [f"{prefix}{(place + i) * 7919 % count}" for i in range(len(part))]
        place += len(part)
        found.append(requests(server, names, part))
    return found


def mix(server, part):
    """A batch of four kinds of rows, eight each."""
    names = [("LN", "Prefix", "Adapter", "")[i % 4] for i in range(len(part))]
    return requests(server, [f"{n}{i}" if n else "base" for i, n in enumerate(names)], part)


def full_load(server, parts):
    """Rows per second through the queue, and the share of time outside of the model."""
    import threading

    texts = [text for part in parts for text in part]
    counts, served = server.engine.counts, server.models.first
    before, seconds, begin = counts.rows, served.forward_seconds, time.perf_counter()
    stop = begin + 8

    def ask(seed):
        i = seed
        while time.perf_counter() < stop:
            server.predict(f"LN{i * 31 % 1000}", [texts[i % len(texts)]])
            i += 64

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    passed = time.perf_counter() - begin
    inside = served.forward_seconds - seconds
    return {"rows per second": (counts.rows - before) / passed, "outside": 1 - inside / passed, "threads": 64}


def peft_arm(task, parts):
    """HF PEFT's own mixed batches of 32 LoRA adapters."""
    try:
        import peft
    except ImportError:
        return {}
    model, tokenizer = sm.load("minilm", task=task)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
    mixed = peft.get_peft_model(model.bert, config, adapter_name="a0").eval()
    for i in range(1, ROWS):
        mixed.add_adapter(f"a{i}", config)
    names = [f"a{i}" for i in range(ROWS)]
    encoded = [tokenizer(part, padding=True, return_tensors="pt") for part in parts]

    def run():
        with torch.inference_mode():
            return sum(len(mixed(**b, adapter_names=names[: len(b["input_ids"])])[0]) for b in encoded)

    return {"HF PEFT, adapter_names, LoRA rank 8, 32 loaded": run}


def texts(args):
    """Texts of a causal LM by 16 deltas, side by side and one after another."""
    model, tokenizer = sm.load("smollm2")
    sm.attach(model, "LN()")
    first = sm.detach(model).with_info(task={"kind": "causal-lm", "text": ["text"]})
    sampling, prompt = sm.Sampling(max_tokens=args.tokens), "The history of the city begins with"
    found = {"side by side": [], "one after another": []}
    with sm.Server(model, processor=tokenizer) as server:
        for i in range(16):
            generator = torch.Generator().manual_seed(i)
            noise = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in first.tensors.items()}
            server.add(f"d{i}", replace(first, tensors=noise))
        for turn in range(args.repeats + 1):
            begin = time.perf_counter()
            together = [server.begin(f"d{i}", prompt, sampling) for i in range(16)]
            one = [text.future.result().text for text in together]
            middle = time.perf_counter()
            other = [server.generate(f"d{i}", prompt, sampling).text for i in range(16)]
            end = time.perf_counter()
            assert one == other
            if turn:
                found["side by side"].append(middle - begin)
                found["one after another"].append(end - middle)
    seconds = {name: statistics.median(values) for name, values in found.items()}
    return {"seconds": seconds, "times faster": seconds["one after another"] / seconds["side by side"]}


def main() -> None:
    """All parts, printed and kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--parts", nargs="*", default=["classifiers", "texts"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "serving.json")
    args = parser.parse_args()
    found = {}
    for part in args.parts:
        found[part] = {"classifiers": classifiers, "texts": texts}[part](args)
        for name, value in found[part].items():
            print(name, value, file=sys.stderr)
    write(args.out, {"environment": describe(), **found})


if __name__ == "__main__":
    main()
