"""How much of LayerNorm is enough, and does it matter which part?

Arms at equal budgets: the highest Fisher information, the lowest, the largest gains and biases, values at random, and
values at random within the tensors (layers and terms) that Fisher chose. Beside them all of LayerNorm, and the
head alone.

    python studies/which_parameters/keep.py --tasks sst2,trec
"""

from pathlib import Path

from common import interval, load_tasks, mean_sd, options, settings, table, write

import smidgen as sm
from smidgen.studies.experiments.arm import Bench

ARMS = ("fisher", "random within fisher's tensors", "random", "magnitude", "bottom")


def selections(model, information, keep, seed):
    """Arm -> selection."""
    best = sm.select(model, f"LN() | Select('fisher', keep={keep!r})", scores=information)
    yield "fisher", best
    yield "random within fisher's tensors", best.shuffled(seed)
    yield "random", sm.select(model, f"LN() | Select('random', keep={keep!r}, seed={seed})")
    yield "magnitude", sm.select(model, f"LN() | Select('magnitude', keep={keep!r})")
    yield "bottom", sm.select(model, f"LN() | Select('fisher', keep={keep!r}, order='bottom')", scores=information)


def study(given):
    runs, folder = [], f"keep-{given.lr}" if given.lr else "keep"
    for task in load_tasks(given):
        for seed in range(given.seeds):
            model, tokenizer = sm.load(given.model, task=task, seed=seed)
            bench = Bench(model, tokenizer, task, seed, settings(given), "test", Path(given.runs) / folder)
            reading = {"tokenizer": tokenizer, "seed": seed, "max_length": given.max_length}
            information = sm.score(model, "LN() | Select('fisher')", task, **reading)
            runs.append(bench.run("head alone", sm.parse("Head()")) | {"keep": 0.0})
            runs.append(bench.run("all", sm.parse("LN()")) | {"keep": 1.0})
            for keep in map(float, given.keep.split(",")):
                for arm, chosen in selections(model, information, keep, seed):
                    runs.append(bench.run(f"{arm} {keep}", chosen.recipe, chosen) | {"keep": keep, "arm": arm})
                    print(*(runs[-1][key] for key in ("task", "seed", "arm", "keep", "metric", "value")), flush=True)
    return runs


def picked(runs, task, arm, keep):
    found = [r for r in runs if (r["task"], r["arm"], r["keep"]) == (task, arm, keep)]
    return [r["value"] for r in sorted(found, key=lambda r: r["seed"])]


def report(runs):
    tasks, keeps = (list(dict.fromkeys(run[key] for run in runs)) for key in ("task", "keep"))
    shares = sorted(k for k in keeps if 0 < k < 1)
    parts = ["# How much of LayerNorm is enough, and does it matter which part?"]
    for task in tasks:
        metric = next(r["metric"] for r in runs if r["task"] == task)
        rows = [[arm, *(mean_sd(picked(runs, task, arm, k)) for k in shares)] for arm in ARMS]
        whole, head = mean_sd(picked(runs, task, "all", 1.0)), mean_sd(picked(runs, task, "head alone", 0.0))
        parts.append(f"## {task} ({metric} on test, mean ± sd over seeds)")
        parts.append(f"All of LayerNorm: {whole}. Head alone: {head}.")
        parts.append(table(["kept values", *(f"{k:.0%}" for k in shares)], rows))
    rows = []
    for arm in (*ARMS[1:], "all", "head alone"):
        cells = []
        for k in shares:
            other = {"all": 1.0, "head alone": 0.0}.get(arm, k)
            pairs = [(picked(runs, t, "fisher", k), picked(runs, t, arm, other)) for t in tasks]
            cells.append(interval([a - b for x, y in pairs for a, b in zip(x, y, strict=True)]))
        rows.append([arm, *cells])
    parts.append("## Fisher less the others, in points: mean over tasks and seeds, paired, 95 % t interval")
    parts.append(table(["less", *(f"{k:.0%}" for k in shares)], rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    given = options(__doc__, "sst2,trec", keep="0.02,0.1,0.5")
    runs, name = study(given), f"keep-lr-{given.lr}" if given.lr else "keep"
    columns = ["task", "arm", "keep", "seed", "metric", "value", "trained", "head_values", "seconds"]
    write(given, name, columns, [[run[c] for c in columns] for run in runs], report(runs))
    print(report(runs))
