"""A server under load: connections ask for deltas at random, while deltas are replaced by others, removed and added.

python benchmarks/serving_load.py --requests 100000 --connections 64

A process of `smidgen serve` on MiniLM with 40 deltas of four recipes. Some stay as they are, some are replaced by
deltas with other values and of another recipe, and some are removed and added again as such. Each answer is compared
with what the content of that time gives alone: of the content before or after a change only within the window of the
change, from its request to its answer. A delta that is removed may be answered by 404 from the beginning of its removal
to the end of its return, and has to be in between.

The rows are parts of the run, with their requests, those that were right, wrong, refused by another status, and lost,
and the server's memory before and after. Of the right ones, "absent" are 404s of a delta that was removed, and "in a
window" those for which two contents were right.
"""

import argparse
import asyncio
import collections
import itertools
import math
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
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
FILES = ("delta.json", "delta.safetensors")
NEAR = 1e-4  # of probabilities, between an answer and what the content gives alone
FATES = ("stays", "replaced", "removed")
COUNTED = ("requests", "right", "wrong", "refused", "lost", "absent", "in a window")


@dataclass
class Stay:
    """A content under a name, or None for no delta: from when it may have been there, until when."""

    content: int | None
    begin: float
    end: float = math.inf


class History:
    """What was there under one name, and when."""

    def __init__(self, content, now=-math.inf):
        self.stays = [Stay(content, now)]

    @property
    def now(self):
        """The content that was given last."""
        return self.stays[-1].content

    def begin(self, content, now):
        """A change is asked for: the old content and the new one are right from now on."""
        self.stays.append(Stay(content, now))

    def end(self, now):
        """It is answered: the old content is right no more."""
        self.stays[-2].end = now

    def between(self, begin, end):
        """Contents that a request from one time to another may be answered by, None for 404."""
        return {stay.content for stay in self.stays if stay.begin <= end and stay.end >= begin}


@dataclass
class Name:
    """A name that is asked for.

    Attributes:
        fate: what happens to it.
        contents: files of each content.
        wanted: content -> text -> label -> probability, of each alone.
    """

    fate: str
    contents: list[dict[str, bytes]]
    wanted: list[dict[str, dict[str, float]]]
    history: History = field(default_factory=lambda: History(0))

    def fitting(self, texts, answers):
        """Contents that give these answers."""
        return {
            i
            for i, wanted in enumerate(self.wanted)
            if all(apart(wanted[text], one["probabilities"]) < NEAR for text, one in zip(texts, answers, strict=True))
        }


def apart(one, other):
    """The largest difference of two sets of probabilities."""
    return max(abs(p - other.get(label, math.inf)) for label, p in one.items())


def made(folder, count, versions):
    """Names with their contents, the first of each in the folder."""
    task = sm.Task.load("bbc-news", limit=50)
    model, tokenizer = sm.load("minilm", task=task)
    info = {"task": {"kind": "classification", "text": ["text"]}}
    names, generator = {}, torch.Generator().manual_seed(0)
    for i in range(count):
        fate = FATES[i % len(FATES)]
        name = Name(fate, [], [])
        for version in range(1 if fate == "stays" else versions):
            sm.attach(model, RECIPES[(i + version) % len(RECIPES)], pooling="mean" if i % 2 else None)
            first = sm.detach(model).with_info(**info)
            noise = {n: t + 0.05 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
                     for n, t in first.tensors.items()}  # fmt: skip
            delta = replace(first, tensors=noise)
            place = folder / f"d{i}" if not version else folder.parent / f"d{i}-{version}"
            delta.save(place)
            name.contents.append({file: (place / file).read_bytes() for file in FILES})
            found = sm.predict(model, TEXTS, delta=delta, tokenizer=tokenizer)
            name.wanted.append({one.text: dict(one.probabilities) for one in found})
        closest = (apart(a[text], b[text]) for a, b in itertools.combinations(name.wanted, 2) for text in TEXTS)
        assert min(closest, default=1.0) > 10 * NEAR, f"contents of d{i} cannot be told apart"
        names[f"d{i}"] = name
    return names


@dataclass
class Load:
    """A run: what is left to ask, and what was counted, part by part."""

    requests: int
    parts: int
    process: psutil.Process
    asked: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    changes: collections.Counter[str] = field(default_factory=collections.Counter)
    seconds: list[float] = field(default_factory=list)

    def draw(self):
        """The row of one more request, None when all are asked; a part begins with its first request."""
        if self.asked == self.requests:
            return None
        if self.asked * self.parts // self.requests >= len(self.rows):
            self.measure()
            self.rows.append(dict.fromkeys(COUNTED, 0) | {"MiB before": self.memory()})
        self.asked += 1
        self.rows[-1]["requests"] += 1
        return self.rows[-1]

    def measure(self):
        """The memory behind a part."""
        if self.rows:
            self.rows[-1]["MiB after"] = self.memory()

    def memory(self):
        """Of the server, now."""
        return round(self.process.memory_info().rss / 2**20, 1)


def verdict(name, texts, status, answers, begin, end):
    """What an answer is, and whether a change was under way while it was given."""
    allowed = name.history.between(begin, end)
    if status == 404:
        return "right" if None in allowed else "wrong", len(allowed) > 1
    if status != 200:
        return "refused", False
    return "right" if name.fitting(texts, answers) & allowed else "wrong", len(allowed) > 1


async def ask(client, load, names, seed):
    """One connection: a request after another."""
    draw = random.Random(seed)
    while (row := load.draw()) is not None:
        name, texts = draw.choice(sorted(names)), draw.sample(TEXTS, draw.choice((1, 1, 1, 2)))
        begin = time.perf_counter()
        try:
            answer = await client.post("/v1/predict", json={"model": name, "inputs": texts})
        except httpx.HTTPError:
            row["lost"] += 1
            continue
        end = time.perf_counter()
        load.seconds.append(end - begin)
        said, window = verdict(names[name], texts, answer.status_code, answer.json().get("answers"), begin, end)
        row[said] += 1
        row["absent"] += said == "right" and answer.status_code == 404
        row["in a window"] += said == "right" and window


async def change(client, load, names, seed, done):
    """Replace deltas by other content, or remove them and add other content, all the while."""
    draw = random.Random(seed)
    while not done.is_set():
        key = draw.choice(sorted(names))
        name = names[key]
        last = name.history.now
        if name.fate == "removed" and last is not None:
            content, status = None, 204
            name.history.begin(None, time.perf_counter())
            answer = await client.delete(f"/v1/deltas/{key}")
        else:
            content, status = draw.choice([i for i in range(len(name.contents)) if i != last]), 201
            name.history.begin(content, time.perf_counter())
            answer = await client.put(f"/v1/deltas/{key}", files=name.contents[content])
        name.history.end(time.perf_counter())
        what = {None: "removed"}.get(content, "added as another" if last is None else "replaced by another")
        load.changes[what if answer.status_code == status else f"{what}: status {answer.status_code}"] += 1
        await asyncio.sleep(0.05)


async def run(url, load, args, names):
    """All connections at once, and two that change deltas, each its own; seconds that it took."""
    done, limits = asyncio.Event(), httpx.Limits(max_connections=args.connections + 4)
    changing = [name for name in sorted(names) if names[name].fate != "stays"]
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        others = [
            asyncio.create_task(change(client, load, {n: names[n] for n in changing[i::2]}, i, done)) for i in range(2)
        ]
        begin = time.perf_counter()
        await asyncio.gather(*(ask(client, load, names, seed) for seed in range(args.connections)))
        passed = time.perf_counter() - begin
        load.measure()
        done.set()
        await asyncio.gather(*others)
    return passed


def main() -> None:
    """Start the server, load it, stop it, print and keep the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--deltas", type=int, default=40)
    parser.add_argument("--contents", type=int, default=3, help="of each delta that changes")
    parser.add_argument("--parts", type=int, default=10, help="rows of the report")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "serving-load.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "deltas"
        folder.mkdir()
        names = made(folder, args.deltas, args.contents)
        command = [sys.executable, "-m", "smidgen.cli", "serve", "--deltas", str(folder), "--port", "0"]
        with (Path(place) / "log").open("w") as log:
            server = subprocess.Popen(command, stderr=log)
            while not (said := (Path(place) / "log").read_text()).startswith("http"):
                time.sleep(0.2)
            url = said.split()[0]
            httpx.get(f"{url}/readyz", timeout=60)
            load = Load(args.requests, args.parts, psutil.Process(server.pid))
            passed = asyncio.run(run(url, load, args, names))
            server.send_signal(signal.SIGTERM)
            status = server.wait(60)
    seconds = sorted(load.seconds)
    total = {key: sum(row[key] for row in load.rows) for key in COUNTED}
    found = {
        "environment": describe(),
        "connections": args.connections,
        "deltas": {fate: sum(name.fate == fate for name in names.values()) for fate in FATES},
        "rows": load.rows,
        "total": total | {"MiB before": load.rows[0]["MiB before"], "MiB after": load.rows[-1]["MiB after"]},
        "changes": dict(sorted(load.changes.items())),
        "seconds": passed,
        "requests per second": args.requests / passed,
        "ms": {q: 1e3 * seconds[int(q / 100 * (len(seconds) - 1))] for q in (50, 95, 99, 100)},
        "status at the end": status,
    }
    write(args.out, found)
    for name, value in found.items():
        print(*([name, *value] if name == "rows" else [name, value]), sep="\n  " if name == "rows" else " ")


if __name__ == "__main__":
    main()
