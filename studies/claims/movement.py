"""C17: does LayerNorm move farther with more data? Nothing is trained: it reads the runs of a study.

python studies/claims/run.py data_sizes && python studies/claims/movement.py

Of every run of LayerNorm tuning: the mean over its values of |θ − θ₀|, and the same over the sum of its learning rates.
More examples are more steps at equal epochs, and Adam moves a value by about its rate in each: the second says what is
left beyond that.
"""

import argparse

from run import HERE, written

import smidgen as sm
from smidgen.delta.delta import Delta
from smidgen.studies.comparison.comparing import reopened
from smidgen.studies.experiments.tuning_changes import lr_steps


def movement(model, delta):
    """Mean |θ − θ₀| over what is trained in place, the head apart."""
    base = dict(model.named_parameters())
    moved = [
        (tensor.double() - base[name].detach().double()).abs().flatten()
        for name, tensor in delta.tensors.items()
        if name not in delta.head
    ]
    return sum(float(part.sum()) for part in moved) / sum(part.numel() for part in moved)


def rows(found, arm):
    """A row for each run: task, examples, lr, seed, movement, movement over the sum of rates."""
    study = found.study
    tasks = {task.name: task for task in (data.load() for data in study.tasks)}
    for result in found.results:
        if result.arm != arm or result.error is not None:
            continue
        delta = Delta.load(found.store.fit(result.key))
        model, _ = sm.load(result.model, task=tasks[result.task], dtype=study.dtype, seed=result.seed)
        moved, rates = movement(model, delta), lr_steps(delta)
        size = result.examples or len(tasks[result.task].split("train"))
        yield [result.task, size, result.lr, result.seed, moved, moved / rates]


def told(lines):
    """At how many rates the movement, and that for each unit of rate, grows from size to size."""
    curves = {}
    for task, size, lr, seed, *moved in lines:
        if seed == min(line[3] for line in lines):  # the seed that tried every rate
            curves.setdefault((task, lr), {})[size] = moved
    parts = []
    for column, name in enumerate(("|θ − θ₀|", "|θ − θ₀| / Σ lr")):
        rising = 0
        for curve in curves.values():
            values = [curve[size][column] for size in sorted(curve)]
            rising += values == sorted(values)
        parts.append(f"{name} grows with every step in size at {rising} of {len(curves)} task x rate")
    return "; ".join(parts) + "."


def main():
    """Measure, then write results/movement.md and .csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="data_sizes")
    parser.add_argument("--arm", default="LN")
    given = parser.parse_args()
    lines = sorted(rows(reopened(HERE / "runs" / given.study), given.arm), key=lambda line: (line[0], line[2], line[1]))
    columns = ["task", "examples", "lr", "seed", "|θ − θ₀|", "|θ − θ₀| / Σ lr"]
    written("movement", "Movement of LayerNorm by number of examples", told(lines), columns, lines)


if __name__ == "__main__":
    main()
