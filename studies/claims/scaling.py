"""C20: does scaling the trained change help where examples are few? Nothing is trained: it reads the runs of a study.

python studies/claims/run.py data_sizes && python studies/claims/scaling.py

Each tested run of LayerNorm tuning with at most `--examples` examples is evaluated at θ₀ + λ (θ − θ₀), the head as
trained. λ is chosen on validation, and the test split read at that λ and at 1.
"""

import argparse

from run import HERE, written

import smidgen as sm
from smidgen.data.resplitting import with_test
from smidgen.delta.delta import Delta
from smidgen.studies.comparison.comparing import reopened
from smidgen.studies.statistics.paired_differences import paired_difference

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


def scores(model, task, delta, scale, split, processor):
    """The task's metric at a scale."""
    scaled = (scale * delta).on(model)
    return sm.evaluate(model, task, delta=scaled, split=split, processor=processor).value


def rows(found, arm, most):
    """A row for each tested run: task, examples, seed, λ chosen, test at λ, at 1, and validation at each λ."""
    study = found.study
    tasks = {task.name: task for task in (with_test(data.load(), validation=study.validation) for data in study.tasks)}
    for result in found.results:
        few = result.examples is not None and result.examples <= most
        if result.arm != arm or result.test is None or not few:
            continue
        task, delta = tasks[result.task], Delta.load(found.store.fit(result.key))
        model, processor = sm.load(result.model, task=task, dtype=study.dtype, seed=result.seed)
        curve = [scores(model, task, delta, scale, "validation", processor) for scale in SCALES]
        best = max(SCALES, key=lambda scale: (curve[SCALES.index(scale)], -abs(scale - 1)))
        test = [scores(model, task, delta, scale, "test", processor) for scale in (best, 1.0)]
        yield [result.task, result.examples, result.seed, best, *test, *curve]
        print(result.task, result.examples, result.seed, best, *test, flush=True)


def main():
    """Evaluate, then write results/scaling.md and .csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="data_sizes")
    parser.add_argument("--arm", default="LN")
    parser.add_argument("--examples", type=int, default=1000)
    given = parser.parse_args()
    lines = list(rows(reopened(HERE / "runs" / given.study), given.arm, given.examples))
    by_cell = {}
    for line in lines:
        by_cell.setdefault((line[0], line[1]), []).append((line[4], line[5]))
    cells = list(by_cell.values())
    most = max(map(len, cells))
    chosen, whole = ([[p[i] for p in cell] + [float("nan")] * (most - len(cell)) for cell in cells] for i in (0, 1))
    said = paired_difference(chosen, whole)
    interval = "no interval" if said.interval is None else f"[{said.interval[0]:+.4f}, {said.interval[1]:+.4f}]"
    text = f"Test at the λ chosen on validation less test at λ = 1: {said.mean:+.4f} {interval}, {said.pairs} pairs."
    columns = ["task", "examples", "seed", "λ", "test at λ", "test at 1", *(f"validation at {s:g}" for s in SCALES)]
    written("scaling", "Scaling the trained change", text, columns, lines)


if __name__ == "__main__":
    main()
