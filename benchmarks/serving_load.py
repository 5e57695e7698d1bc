"""A server under load: many connections ask for deltas at random, while deltas are added, replaced and removed.

python benchmarks/serving_load.py --requests 100000 --connections 64

A process of `smidgen serve` on MiniLM with 40 deltas of four recipes. Each answer is compared with what the delta
gives alone. Counted are answers that are right, wrong, of another status, and lost; the server's memory is read every
second after the first tenth.
"""

import argparse
import asyncio
import collections
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import torch
from environment import describe, write
from transformers.utils import logging

import smidgen as sm

logging.set_verbosity_error()
ROOT = Path(__file__).parents[1]
RECIPES = ("LN()", "LoRA(rank=4)", "Prefix(length=4)", "LN() | Select('random', keep=0.2)")
TEXTS = ["the game", "votes", "a new phone", "stocks fell", "the film was good", "goal", "music", "tax and bank"]


def made(folder, count):
    """Deltas of several recipes in a folder, and name -> text -> probabilities of each alone."""
    task = sm.Task.load("bbc-news", limit=50)
    model, tokenizer = sm.load("minilm", task=task)
    info = {"task": {"kind": "classification", "text": ["text"]}}
    wanted, generator = {}, torch.Generator().manual_seed(0)
    for i in range(count):
        sm.attach(model, RECIPES[i % len(RECIPES)], pooling="mean" if i % 2 else None)
        first = sm.detach(model).with_info(**info)
        noise = {n: t + 0.05 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
                 for n, t in first.tensors.items()}  # fmt: skip
        delta = replace(first, tensors=noise)
        delta.save(folder / f"d{i}")
        found = sm.predict(model, TEXTS, delta=delta, tokenizer=tokenizer)
        wanted[f"d{i}"] = {one.text: dict(one.probabilities) for one in found}
    return wanted


async def ask(client, left, wanted, counts, seconds, seed):
    """One connection: a request after another."""
    draw = random.Random(seed)
    names = sorted(wanted)
    while left:
        left.pop()
        name, texts = draw.choice(names), draw.sample(TEXTS, draw.choice((1, 1, 1, 2)))
        begin = time.perf_counter()
        try:
            answer = await client.post("/v1/predict", json={"model": name, "inputs": texts})
        except httpx.HTTPError as error:
            counts[f"lost: {type(error).__name__}"] += 1
            continue
        seconds.append(time.perf_counter() - begin)
        if answer.status_code != 200:
            counts[f"status {answer.status_code}"] += 1
            continue
        each = zip(texts, answer.json()["answers"], strict=True)
        apart = [abs(one["probabilities"][k] - p) for text, one in each for k, p in wanted[name][text].items()]
        counts["right" if max(apart) < 1e-4 else "wrong"] += 1


async def change(client, folder, names, counts, done):
    """Add, replace by the same and remove deltas, all the while."""
    i = 0
    while not done.is_set():
        name = names[i % len(names)]
        files = {file: (folder / name / file).read_bytes() for file in ("delta.json", "delta.safetensors")}
        for target in (f"more{i % 7}", name):
            answer = await client.put(f"/v1/deltas/{target}", files=files)
            counts[f"PUT {answer.status_code}"] += 1
        answer = await client.delete(f"/v1/deltas/more{i % 7}")
        counts[f"DELETE {answer.status_code}"] += 1
        i += 1
        await asyncio.sleep(0.05)


async def measure(process, requests, left, memory, done):
    """The server's memory, every second."""
    while not done.is_set():
        if len(left) < 0.9 * requests:
            memory.append(process.memory_info().rss)
        await asyncio.sleep(1)


async def load(url, process, args, folder, wanted):
    """All connections at once; counts, seconds of each request, memory."""
    left, counts, seconds, memory = list(range(args.requests)), collections.Counter(), [], []
    done, limits = asyncio.Event(), httpx.Limits(max_connections=args.connections + 4)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        others = [
            asyncio.create_task(change(client, folder, sorted(wanted), counts, done)),
            asyncio.create_task(measure(process, args.requests, left, memory, done)),
        ]
        begin = time.perf_counter()
        await asyncio.gather(*(ask(client, left, wanted, counts, seconds, seed) for seed in range(args.connections)))
        passed = time.perf_counter() - begin
        done.set()
        await asyncio.gather(*others)
    return counts, sorted(seconds), memory, passed


def main() -> None:
    """Start the server, load it, stop it, print and keep the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--deltas", type=int, default=40)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "serving-load.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "deltas"
        folder.mkdir()
        wanted = made(folder, args.deltas)
        command = [sys.executable, "-m", "smidgen.cli", "serve", "--deltas", str(folder), "--port", "0"]
        with (Path(place) / "log").open("w") as log:
            server = subprocess.Popen(command, stderr=log)
            while not (said := (Path(place) / "log").read_text()).startswith("http"):
                time.sleep(0.2)
            url = said.split()[0]
            httpx.get(f"{url}/readyz", timeout=60)
            counts, seconds, memory, passed = asyncio.run(load(url, psutil.Process(server.pid), args, folder, wanted))
            server.send_signal(signal.SIGTERM)
            status = server.wait(60)
    found = {
        "environment": describe(),
        "requests": args.requests,
        "connections": args.connections,
        "counts": dict(sorted(counts.items())),
        "seconds": passed,
        "requests per second": args.requests / passed,
        "ms": {q: 1e3 * seconds[int(q / 100 * (len(seconds) - 1))] for q in (50, 95, 99, 100)},
        "memory, MiB": {"first": memory[0] / 2**20, "last": memory[-1] / 2**20, "most": max(memory) / 2**20},
        "status at the end": status,
    }
    write(args.out, found)
    for name, value in found.items():
        print(name, value)


if __name__ == "__main__":
    main()
