"""The study's table: test accuracy over seeds without and with LN(), and the difference with its interval."""

import numpy as np

DRAWS = 10_000


def right(run):
    """One run's right (1) and wrong (0) test examples."""
    return np.array(list(bin(int(run["right"], 16))[3:]), dtype=np.int8)


def interval(differences, seed=0):
    """95 % of means over resampled seeds and resampled examples; differences: (seeds, examples)."""
    rng = np.random.default_rng(seed)
    seeds, examples = differences.shape
    means = np.empty(DRAWS)
    for draw in range(DRAWS):
        rows = rng.integers(seeds, size=seeds)
        columns = rng.integers(examples, size=examples)
        means[draw] = differences[rows].mean(0)[columns].mean()
    return np.percentile(means, [2.5, 97.5])


def cells(results):
    """Rows of the table: one method on one task."""
    test = [run for run in results["runs"] if run["seed"] != 0]
    for task in dict.fromkeys(run["task"] for run in test):
        for method in dict.fromkeys(run["method"] for run in test):
            pair = [
                sorted(
                    (r for r in test if (r["task"], r["method"], r["ln"]) == (task, method, norm)),
                    key=lambda r: r["seed"],
                )
                for norm in (False, True)
            ]
            off, on = pair
            if off and len(off) == len(on):
                yield task, method, off, on


def render(results):
    """A markdown table."""
    lines = [
        "| task | method | values | lr | without LN | lr | with LN | difference, points | 95 % interval |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for task, method, off, on in cells(results):
        a, b = (np.stack([right(run) for run in runs]) for runs in (off, on))
        low, high = interval((b - a).astype(float))
        lines.append(
            f"| {task} | {method} | {off[0]['values']:,} | {off[0]['lr']:g} | {_score(a)} | {on[0]['lr']:g} "
            f"| {_score(b)} | {100 * (b.mean() - a.mean()):+.1f} | {100 * low:+.1f} ... {100 * high:+.1f} |"
        )
    return "\n".join(lines)


def _score(found):
    means = 100 * found.mean(1)
    return f"{means.mean():.1f} ± {means.std(ddof=1):.1f}" if len(means) > 1 else f"{means.mean():.1f}"
