"""What the studies share: tasks, options, and results as CSV and Markdown with what they were measured on."""

import argparse
import csv
import math
import shlex
import statistics
import sys
from pathlib import Path

from scipy import stats

import smidgen as sm

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from environment import describe  # noqa: E402

HERE = Path(__file__).parent
FOLDERS = {"sst2": "glue/sst2", "mrpc": "glue/mrpc", "stsb": "glue/stsb", "trec": "trec", "sst5": "sst5"}
MOST = {"validation": 200, "test": 900}  # the first chooses the best epoch, the second is what is reported


def options(doc, tasks, **more):
    """The command line of a study."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="folder with the tasks")
    parser.add_argument("--tasks", default=tasks)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--limit", type=int, default=640, help="training examples")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.0, help="of what is tuned; 0 for the method's own")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--out", default=str(HERE / "results"))
    parser.add_argument("--runs", default=str(HERE / "runs"), help="finished runs; started again, a study goes on here")
    for name, value in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, type=type(value))
    return parser.parse_args()


def load_tasks(given):
    """The tasks, cut to size."""
    found = []
    for name in given.tasks.split(","):
        task = sm.Task.load(Path(given.data) / FOLDERS[name], name=name)
        most = {"train": given.limit, **MOST}
        limit = {split: min(n, len(task.split(split))) for split, n in most.items()}
        found.append(sm.Task.load(Path(given.data) / FOLDERS[name], name=name, limit=limit))
    return found


def settings(given):
    chosen = {"epochs": given.epochs, "batch_size": given.batch_size, "max_length": given.max_length, "progress": False}
    return {**chosen, "lr": given.lr} if given.lr else chosen


def mean_sd(values):
    """`0.812 ± 0.006`."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def interval(gaps):
    """Mean of paired differences with its 95 % t interval, in points."""
    mean = statistics.mean(gaps)
    if len(gaps) < 2:
        return f"{100 * mean:+.1f}"
    half = stats.t.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return f"{100 * mean:+.1f} [{100 * (mean - half):+.1f}, {100 * (mean + half):+.1f}]"


def table(columns, rows):
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def write(given, name, columns, rows, text):
    """`name`.csv with every number and `name`.md with the tables, the command and the machine."""
    folder = Path(given.out)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    about = describe()
    chosen = {k: v for k, v in vars(given).items() if k not in ("data", "out", "runs")}
    words = [word for key, value in chosen.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    command = shlex.join(["python", f"studies/which_parameters/{Path(sys.argv[0]).name}", *words])
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    machine = ", ".join(f"{k} {v}" for k, v in about["machine"].items())
    foot = f"\n\n---\n\n`{command}`\n\n{machine}; {versions}; commit {about['commit']}.\n"
    (folder / f"{name}.md").write_text(text.strip() + foot, encoding="utf-8")
