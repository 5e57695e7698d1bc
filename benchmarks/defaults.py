"""Every method at its defaults, beside Head() and Full(): accuracy on BBC news, with few articles and with more.

python benchmarks/defaults.py                     all that is missing in benchmarks/results/defaults.json
python benchmarks/defaults.py --jobs 2 --budgets 300x2 --poolings mean --seeds 1
python benchmarks/defaults.py --table             prints what is there

A budget is articles x epochs. `before` marks what a method's defaults were where they have changed since. All arms
train on a bfloat16 base; `--check` puts a float32 base beside it for some. Batches are shuffled: nearly all articles
are longer than `--max-length`, so batches of like length save nothing. Runs stand in an order in which a part of them
is of use; one that is in the file, with the same fields and rates, is not made again.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
from environment import describe, write

import smidgen as sm
import smidgen.methods  # fills the registry
from smidgen.methods.base import Method
from smidgen.recipe.recipe import Term

HEAD, FULL = "Head()", "Full()"
FAST, PLAIN = {"dtype": "bfloat16"}, {"dtype": "float32"}
CHECKED = (HEAD, "LN()", "LoRA()", FULL)
POOLINGS = {"mean": "mean of the tokens", "own": "the class's own token"}
EXTRA = ("Prefix(mlp=256)", "Prefix(mlp=800)", "MAM")
# arm -> recipe and the learning rate that all of its tensors had; alpha=None is alpha = rank
BEFORE = {
    "LoRA()": ("LoRA(alpha=None)", 1e-3),
    "DoRA()": ("DoRA(alpha=None)", 1e-3),
    "MoS()": ("MoS(alpha=None)", 3e-3),
    "TriAdaptLoRA()": ("TriAdaptLoRA(alpha=None, orthogonality=0.5)", 1e-2),
    "Prefix(mlp=256)": ("Prefix(mlp=256)", 1e-2),
    "Prefix(mlp=800)": ("Prefix(mlp=800)", 1e-2),
}


def arms():
    """The baselines first, then every registered method with its defaults."""
    names = sorted(n for n, c in Term.registry.items() if issubclass(c, Method) and n not in ("Full", "Head"))
    return [HEAD, FULL, *(f"{name}()" for name in names), *EXTRA]


@cache
def cut(data, articles, test):
    return sm.Task.load(data, limit={"train": articles, "validation": 100, "test": test})


@cache
def loaded(model, data, test, dtype, seed):
    """A model with a head of this seed, and its tokenizer: once for each process."""
    return sm.load(model, task=cut(data, 100, test), seed=seed, dtype=dtype)


def one(run, options):
    """A run with its accuracy on the test articles, of the best epoch on the validation articles."""
    articles, epochs = map(int, run["budget"].split("x"))
    task = cut(options.data, articles, options.test)
    model, tokenizer = loaded(options.model, options.data, options.test, run["dtype"], run["seed"])
    how = {"max_length": options.max_length, "progress": False, "epochs": epochs}
    pooling = None if run["pooling"] == "own" else run["pooling"]
    recipe, begin = sm.parse(run["recipe"]), time.perf_counter()
    with one_rate(recipe) if "lr" in run else nullcontext():
        how |= {"lr": run.get("lr"), "seed": run["seed"], "pooling": pooling, "tokenizer": tokenizer}
        delta = sm.fit(model, recipe, task, **how)
    seconds = time.perf_counter() - begin
    found = sm.evaluate(model, task, delta=delta, split="test", tokenizer=tokenizer, max_length=options.max_length)
    accuracy = round(found.values["accuracy"], 5)
    return {**run, "accuracy": accuracy, "values": delta.trained, "seconds": round(seconds, 1)}


@contextmanager
def one_rate(recipe):
    """All tensors of a method learn at the same rate, as they did before."""
    with ExitStack() as stack:
        for term in recipe:
            stack.enter_context(patch.object(type(term), "rate", Method.rate))
        yield


def wanted(options):
    """All runs, baselines of a block first, one seed of all arms before the next."""
    blocks = [(pooling, budget) for pooling in options.poolings for budget in options.budgets]
    runs = []
    for pooling, budget in blocks:
        for seed in range(options.seeds):
            base = {"pooling": pooling, "budget": budget, "seed": seed}
            for arm in options.only or arms():
                runs.append({"arm": arm, "recipe": arm, **base, **FAST})
                if arm in BEFORE and not options.no_before:
                    recipe, lr = BEFORE[arm]
                    runs.append({"arm": f"{arm}, before", "recipe": recipe, "lr": lr, **base, **FAST})
                if options.check and arm in CHECKED:
                    runs.append({"arm": f"{arm}, float32", "recipe": arm, **base, **PLAIN})
    return [run | detailed(run) for run in runs]


def detailed(run):
    """Fields and rates of a run's terms: with other defaults it is another run."""
    terms = list(sm.parse(run["recipe"]))
    same = "lr" in run
    rates = [{name: term.lr * (1 if same else term.rate(name)) for name in ("", "B", "W1")} for term in terms]
    return {"fields": [asdict(term) for term in terms], "rates": [run["lr"]] if same else rates}


def key(run):
    """What makes a run the same run."""
    names = ("arm", "pooling", "budget", "seed", "dtype", "fields", "rates")
    return json.dumps([run[name] for name in names])


def missing(runs, made):
    known = {key(run) for run in made}
    return [run for run in runs if key(run) not in known]


def work(given):
    """A run; None if it is too late to begin one."""
    run, options, end = given
    if time.time() > end:
        return None
    torch.set_num_threads(options.threads)
    try:
        return one(run, options)
    except sm.SmidgenError as error:
        return run | {"refused": str(error)}


def table(runs):
    """Mean and standard deviation over seeds, an arm a line, a block a column; runs with defaults of today alone."""
    blocks = list(dict.fromkeys((run["pooling"], run["budget"]) for run in runs))
    today = [run for run in runs if key(run) == key(run | detailed(run))]
    lines = ["| arm | " + " | ".join(f"{POOLINGS[p]}, {b}" for p, b in blocks) + " |", "|---" * (1 + len(blocks)) + "|"]
    for arm in sorted({run["arm"] for run in today}, key=lambda arm: (arm != HEAD, arm != FULL, arm)):
        recipe, before, _ = arm.partition(", ")
        cells = [f"`{recipe}`{arm[len(recipe) :]}" if before else f"`{arm}`"]
        for block in blocks:
            same = [run for run in today if run["arm"] == arm and (run["pooling"], run["budget"]) == block]
            values = [run["accuracy"] for run in same if "accuracy" in run]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            refused = "refused" if same else ""
            cells.append(f"{statistics.mean(values):.3f}{spread} ({len(values)})" if values else refused)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def elsewhere(runs):
    """What the runs of today's defaults that were added to a file later were made on -> their arms."""
    found = {}
    for run in runs:
        if "made" in run and key(run) == key(run | detailed(run)):
            found.setdefault(made_on(run["made"]), {})[run["arm"]] = None
    return {where: list(arms) for where, arms in found.items()}


def made_on(content):
    """Machine, versions and commit in a line."""
    machine, versions = content["machine"], content["versions"]
    where = machine.get("accelerator", f"{machine['cores']} cores" if machine["cores"] > 1 else "one core")
    return f"{where}, torch {versions['torch']}, transformers {versions['transformers']}, commit {content['commit']}"


def options_of():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--data", default="bbc-news")
    parser.add_argument("--budgets", nargs="+", default=["300x2", "640x3"], help="articles x epochs")
    parser.add_argument("--poolings", nargs="+", default=["mean", "own"], help="own: the class's, the first token's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test", type=int, default=445)
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--only", nargs="+", help="arms")
    parser.add_argument("--no-before", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each job")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--out", default="benchmarks/results/defaults.json")
    return parser.parse_args()


def main():
    options = options_of()
    end = time.time() + 60 * options.minutes
    out = Path(options.out)
    shape = {name: getattr(options, name) for name in ("model", "data", "test", "max_length")}
    results = json.loads(out.read_text()) if out.exists() else {"options": shape, **describe(), "runs": []}
    if results["options"] != shape:
        raise SystemExit(f"{out} has runs of {results['options']}; give --out for others")
    if options.table:
        return print(table(results["runs"]))
    todo, here = missing(wanted(options), results["runs"]), describe()
    # of a file that was begun on another machine or commit, each run that is added tells its own
    own = {} if all(results[name] == found for name, found in here.items()) else {"made": here}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for run in filter(None, pool.imap_unordered(work, [(run, options, end) for run in todo])):
            results["runs"].append(run | own)
            write(out, results)
            shown = run.get("accuracy", run.get("refused"))
            print(f"{run['pooling']} {run['budget']} seed {run['seed']}  {run['arm']:28} {shown}", flush=True)
    print(table(results["runs"]))


if __name__ == "__main__":
    main()
