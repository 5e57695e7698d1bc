"""How long it takes to tell a base's content: read whole, looked at again, and deltas put in beside it.

python benchmarks/fingerprint.py [--deltas 1000] [--repeats 5]

A Llama of 134 M random float32 values (SmolLM2's shape). "read" is the first fingerprint of a base, "again" one of a
base that nothing was written to, "put in" a delta of `LN()` for each of many names of `Deltas`. SHA-256 is what files
had before; bytes lie in memory. Wall-clock time, best of the repeats; the load of the machine stands beside it.
"""

import argparse
import os
import time
from dataclasses import replace

import torch
from environment import describe, write
from transformers import LlamaConfig, LlamaForCausalLM

import smidgen as sm
from smidgen.delta import content_hash
from smidgen.delta.fingerprint import SHA256, XXH3, Fingerprint, _sha256

SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip


def seconds(call, repeats, before=lambda: None):
    best = float("inf")
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deltas", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="benchmarks/results/fingerprint.json")
    given = parser.parse_args()
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters())

    def forget():
        content_hash.forget(model.parameters())
        _sha256.clear()

    found = {}
    for name in (XXH3, SHA256):
        spent = seconds(lambda name=name: Fingerprint.of(model, (), algorithm=name), given.repeats, forget)
        found[f"read, {name}"] = {"seconds": round(spent, 4), "gigabytes_per_second": round(size / spent / 1e9, 2)}
    again = seconds(lambda: Fingerprint.of(model, ()), given.repeats)
    found["again"] = {"seconds": round(again, 5)}
    delta = sm.detach(sm.attach(model, "LN()"))
    deltas, times = sm.Deltas(model), []
    for i in range(given.deltas):
        made = replace(delta, tensors={n: t + i for n, t in delta.tensors.items()})
        start = time.perf_counter()
        deltas[str(i)] = made
        times.append(time.perf_counter() - start)
    found[f"{given.deltas} deltas put in"] = {
        "seconds": round(sum(times), 3),
        "first_ms": round(1e3 * times[0], 2),
        "last_ms": round(1e3 * sorted(times[-100:])[len(times[-100:]) // 2], 2),
    }
    load = [round(value, 2) for value in os.getloadavg()]
    write(given.out, {"bytes": size, "load": load, "threads": torch.get_num_threads(), "results": found, **describe()})
    for name, values in found.items():
        print(f"{name}: {', '.join(f'{key} {value:,}' for key, value in values.items())}")


if __name__ == "__main__":
    main()
