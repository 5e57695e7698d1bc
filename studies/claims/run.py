"""Studies of the claims: run one, or what is missing of it, and keep its results as Markdown and CSV.

python studies/claims/run.py small_recipes
python studies/claims/run.py --list

Each NAME.toml is a study of `smidgen compare`. Runs lie in `runs/`, where a study that was stopped goes on; tables with
machine, versions and commit are written to `results/NAME.md`, a line for each run to `results/NAME.csv`.
"""

import argparse
import csv
import shlex
import sys
from pathlib import Path

import smidgen as sm
from smidgen.studies.reports.comparison import write_report

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))
from environment import describe  # noqa: E402


def told(result):
    value = "–" if result.validation is None else f"{result.validation:.4f}"
    print(result.task, result.examples, result.arm, f"{result.lr:g}", result.seed, result.error or value, flush=True)


def environment():
    """Machine, versions and commit in a line."""
    found = describe()
    parts = [f"{name} {value}" for name, value in {**found["machine"], **found["versions"]}.items()]
    return f"{', '.join(parts)}; commit {found['commit']}"


def run(name, jobs):
    out = HERE / "runs" / name
    command = shlex.join(["python", "studies/claims/run.py", name])
    found = sm.compare(sm.Study.read(HERE / f"{name}.toml"), out, jobs=jobs, told=told)
    write_report(found, command)
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    page = (out / "report.md").read_text().rstrip()
    (results / f"{name}.md").write_text(f"{page}\n\n---\n\n`{command}`\n\n{environment()}\n")
    (results / f"{name}.csv").write_text((out / "results.csv").read_text())


def written(name, title, text, columns, rows):
    """results/NAME.md and .csv of a script that reads the runs of a study; the command is the one that was typed."""
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    shown = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *shown))
    command = shlex.join(["python", f"studies/claims/{name}.py", *sys.argv[1:]])
    page = f"# {title}\n\n{text}\n\n{table}\n\n---\n\n`{command}`\n\n{environment()}\n"
    (results / f"{name}.md").write_text(page)
    with open(results / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in HERE.glob("*.toml"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--list", action="store_true", help="the studies, and how many runs each is")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    odd = [name for name in given.names if name not in names]
    if odd:
        parser.error(f"no study {odd[0]!r}; there are {', '.join(names)}")
    if given.list or not given.names:
        for name in names:
            print(f"{name}: {sm.Study.read(HERE / f'{name}.toml').runs} runs")
    for name in given.names:
        run(name, given.jobs)
