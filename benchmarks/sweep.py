"""Thirteen recipes (every kind of method) on a tiny random model of every model type and class of transformers.

    python benchmarks/sweep.py                          everything: some 40 minutes on one core
    python benchmarks/sweep.py --types llama,t5 --recipes "LN(),LoRA(rank=2)"
    python benchmarks/sweep.py --dtype bfloat16 --out benchmarks/results/sweep-bf16.json

Each type runs in a process of its own, so that a crash or a hang ends that type and not the sweep; what --out holds
of the same source and options is not run again (--again runs all). After a change that some types alone can feel:

    python benchmarks/sweep.py --types mra,reformer --merge    the rest of --out stays as another source left it
"""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from itertools import groupby
from multiprocessing.connection import wait
from pathlib import Path

import torch
import transformers
from environment import describe
from tiny_inputs import NotBuiltError, line
from tiny_models import pairs, tiny
from verdicts import OUTCOMES, Subject, judge

RECIPES = (
    "LN()",
    "BitFit()",
    "Full()",
    "Head()",
    "LoRA(rank=2)",
    "LoRA(rank=2, target='linear')",
    "DoRA(rank=2)",
    "IA3()",
    "SSF()",
    "Adapter(width=4)",
    "Compacter(width=4, blocks=2)",
    "Prefix(length=2)",
    "PromptTuning(length=3)",
)
DTYPES = {"float64": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TimeUpError(Exception):
    """A recipe took longer than it may."""


def study(pair, recipes, dtype, seconds):
    """Every recipe's verdict on one pair."""
    try:
        with torch.no_grad(), limit(seconds):
            model, inputs, _ = tiny(pair)
            subject = Subject(model, inputs, DTYPES[dtype])
    except NotBuiltError as error:
        return {"not built": str(error)}
    except BaseException as error:
        return {"not built": line(error)}
    found = {"dtype": str(subject.dtype)[6:], "input": list(inputs), "recipes": {}}
    for recipe in recipes:
        try:
            with limit(seconds):
                found["recipes"][recipe] = judge(subject, recipe)
        except TimeUpError as error:
            found["recipes"][recipe] = {"outcome": "crash", "why": line(error)}
    return found


class limit:  # noqa: N801
    """Raise TimeUpError in the block after so many seconds."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __enter__(self):
        signal.signal(signal.SIGALRM, self._up)
        signal.alarm(self.seconds)

    def __exit__(self, *_):
        signal.alarm(0)

    def _up(self, *_):
        raise TimeUpError(f"more than {self.seconds} seconds")


def worker(group, options, pipe):
    """Send (pair, result) for every pair of a type."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    for pair in group:
        began = time.process_time()
        result = study(pair, options.recipes, options.dtype, options.seconds_per_pair)
        pipe.send((pair, result | {"seconds": round(time.process_time() - began, 1)}))
    pipe.close()


def sweep(groups, options, keep):
    """Run the groups, `jobs` at a time; call keep(pair, result) for each."""
    context = multiprocessing.get_context("fork")
    running, waiting = {}, list(groups)
    while running or waiting:
        while waiting and len(running) < options.jobs:
            group = waiting.pop(0)
            ours, theirs = context.Pipe(False)
            process = context.Process(target=worker, args=(group, options, theirs), daemon=True)
            process.start()
            theirs.close()
            running[ours] = (process, list(group), time.monotonic())
        for pipe in wait(list(running), timeout=5):
            try:
                pair, result = pipe.recv()
            except EOFError:
                process, left, _ = running.pop(pipe)
                process.join()
                for pair in left:
                    keep(pair, {"not built": f"the process ended with exit code {process.exitcode}"})
                continue
            process, left, _ = running[pipe]
            running[pipe] = (process, [p for p in left if p != pair], time.monotonic())
            keep(pair, result)
        for process, _, since in running.values():  # a hang that no signal ends
            if time.monotonic() - since > 4 * options.seconds_per_pair + 60:
                process.kill()


def counts(found, recipes):
    """Outcomes over all cells, by recipe, and the number of pairs that were built."""
    table = {name: Counter() for name in recipes}
    for result in found.values():
        for name in recipes:
            verdict = result.get("recipes", {}).get(name)
            table[name]["not built" if verdict is None else verdict["outcome"]] += 1
            table[name]["unnamed"] += bool(verdict and verdict.get("named") is False)
            table[name]["on a stack"] += bool(verdict and "stack" in verdict)
    names = (*OUTCOMES, "unnamed", "on a stack")
    built = sum("recipes" in result for result in found.values())
    total = {name: sum(row[name] for row in table.values()) for name in names}
    return {
        "pairs": len(found),
        "built": built,
        "types": len({key.split("/")[0] for key in found}),
        "all": total,
        "recipes": {recipe: {name: row[name] for name in names} for recipe, row in table.items()},
    }


def packed(found):
    """Results with every reason written once: smaller files."""
    reasons, places, out = [], {}, {}

    def number(text):
        if text not in places:
            places[text] = len(reasons)
            reasons.append(text)
        return places[text]

    for key, result in sorted(found.items()):
        row = {k: v for k, v in result.items() if k != "recipes"}
        if "not built" in row:
            row["not built"] = number(row["not built"])
        if "recipes" in result:
            row["recipes"] = {
                name: [v["outcome"], *([number(v["why"])] if "why" in v else [])]
                if set(v) <= {"outcome", "why"}
                else v | ({"why": number(v["why"])} if "why" in v else {})
                for name, v in result["recipes"].items()
            }
        out[key] = row
    return reasons, out


def unpacked(content):
    """Pair -> result, from what `packed` made of it."""
    reasons, out = content["reasons"], {}
    for key, row in content["found"].items():
        row = dict(row)
        if "not built" in row:
            row["not built"] = reasons[row["not built"]]
        if "recipes" in row:
            row["recipes"] = {name: _verdict(v, reasons) for name, v in row["recipes"].items()}
        out[key] = row
    return out


def _verdict(value, reasons):
    found = dict(zip(("outcome", "why"), value, strict=False)) if isinstance(value, list) else dict(value)
    return found | ({"why": reasons[found["why"]]} if "why" in found else {})


def save(path, found, options, environment):
    reasons, rows = packed(found)
    content = environment | {
        "dtype": options.dtype,
        "counts": counts(found, options.recipes),
        "cpu_seconds": round(sum(result.get("seconds", 0) for result in found.values())),
        "reasons": reasons,
    }
    text = json.dumps(content, indent=1)[:-2] + ',\n "found": {\n'
    text += ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items()) + "\n }\n}\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def kept(options, environment):
    """What an earlier run of the same commit, versions and options left."""
    try:
        old = json.loads(Path(options.out).read_text())
    except (OSError, ValueError):
        return {}
    if options.merge:
        return _merged(old, options, environment)
    same = all(old.get(key) == environment[key] for key in ("source", "versions")) and old.get("dtype") == options.dtype
    found = unpacked(old) if same and not options.again else {}
    return {k: v for k, v in found.items() if set(options.recipes) <= set(v.get("recipes", ()))}


def _merged(old, options, environment):
    """All of an earlier run but the types that are run now; the sources of both are named."""
    if old["versions"] != environment["versions"] or old["dtype"] != options.dtype:
        raise SystemExit(f"{options.out} is of other versions or of another dtype, so nothing can be merged into it")
    again = set(options.types.split(","))
    environment["source"] = f"{old['source']}, of {len(again)} types {environment['source']}"
    return {key: result for key, result in unpacked(old).items() if key.partition("/")[0] not in again}


def described():
    """What the sweep runs on, with the last commit that changed the library or the sweep itself."""
    paths = ("src", *(f"benchmarks/{name}.py" for name in ("sweep", "verdicts", "uncovered", "tiny_*")))
    last = subprocess.run(
        ["git", "log", "-1", "--format=%h", "--", *paths], capture_output=True, text=True, check=False
    )
    dirty = subprocess.run(["git", "status", "--porcelain", *paths], capture_output=True, text=True, check=False)
    return describe() | {"source": last.stdout.strip() + ("+" if dirty.stdout.strip() else "")}


def split(text):
    """Recipes from a list with commas: those inside brackets do not count."""
    found, depth, current = [], 0, ""
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            found.append(current.strip())
            current = ""
        else:
            current += letter
    return (*found, current.strip())


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default="", help="model types, with commas; all by default")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--sample", type=int, default=0, help="so many types, spread over the list")
    parser.add_argument("--dtype", choices=DTYPES, default="float64", help="float64, or float32 where that fails")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds-per-pair", type=int, default=60, help="to build, and for each recipe")
    parser.add_argument("--merge", action="store_true", help="put --types into what --out holds of another source")
    parser.add_argument("--again", action="store_true", help="run again what --out holds")
    parser.add_argument("--out", default="benchmarks/results/sweep.json")
    options = parser.parse_args()
    options.recipes = split(options.recipes)
    return options


def chosen(options):
    """The pairs to run, by type."""
    everything = pairs()
    types = list(dict.fromkeys(pair.type for pair in everything))
    if options.types:
        wanted = options.types.split(",")
        if unknown := set(wanted) - set(types):
            sys.exit(f"no such type: {', '.join(sorted(unknown))}")
        types = wanted
    if options.sample:
        types = types[:: max(1, len(types) // options.sample)][: options.sample]
    keep = set(types)
    return [list(group) for _, group in groupby((p for p in everything if p.type in keep), key=lambda pair: pair.type)]


def main():
    options = parsed()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    environment = described()
    groups = chosen(options)
    found = kept(options, environment)
    groups = [[p for p in group if str(p) not in found] for group in groups]
    began, total = time.monotonic(), sum(map(len, groups)) + len(found)

    def keep(pair, result):
        found[str(pair)] = result
        outcomes = Counter(v["outcome"] for v in result.get("recipes", {}).values())
        said = ", ".join(f"{n} {name}" for name, n in outcomes.items()) or f"not built: {result['not built']}"
        print(f"{len(found)}/{total} {pair} {result.get('seconds', 0)}s: {said}", flush=True)
        if len(found) % 20 == 0:
            save(options.out, found, options, environment)

    sweep([group for group in groups if group], options, keep)
    save(options.out, found, options, environment)
    print(json.dumps(counts(found, options.recipes)["all"]), f"{time.monotonic() - began:.0f}s")


if __name__ == "__main__":
    main()
