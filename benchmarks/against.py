"""The library as it is here against an earlier commit, in one run: each in processes of their own, by turns.

python benchmarks/against.py --old 97e9666

MiniLM on BBC news. Medians of seconds, and new over old. `deltas` puts 200
deltas of LN beside one model, whose base is read anew.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
HELP = """
import sys
try:
    from smidgen.cli.commands import main
except ImportError:
    from smidgen.cli import main
sys.argv = ["smidgen", "--help"]
main()
"""
WORKER = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(2)
import smidgen as sm
task = sm.Task.load("bbc-news", limit=240)
model, tokenizer = sm.load("minilm", task=task)
common = dict(tokenizer=tokenizer, max_length=64, batch_size=16, progress=False)
found, repeats = {}, int(sys.argv[1])

def clock(name, call):
    begin = time.perf_counter()
    call()
    found.setdefault(name, []).append(time.perf_counter() - begin)

for _ in range(repeats):
    clock("fit LN()", lambda: sm.fit(model, "LN()", task, epochs=1, **common))
    clock("fit LN(layers='top:2')", lambda: sm.fit(model, "LN(layers='top:2')", task, epochs=2, **common))
    clock("fit LoRA()", lambda: sm.fit(model, "LoRA()", task, epochs=1, **common))
    clock("fisher LN()", lambda: sm.fisher(model, task, "LN()", examples=128, tokenizer=tokenizer, max_length=64))
sm.attach(model, "LN()")
delta = sm.detach(model)

def insert():
    deltas = sm.Deltas(model)
    for i in range(200):
        deltas[f"d{i}"] = delta
clock("deltas", insert)
print(json.dumps(found))
"""


def timed(source: Path, repeats: int) -> dict[str, list[float]]:
    """Name -> seconds, of one process on a source tree."""
    env = {**os.environ, "PYTHONPATH": str(source / "src")}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(repeats)], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{source}: {done.stderr[-2000:]}")
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", HELP], env=env, capture_output=True, check=True)
    return {"smidgen --help": [time.perf_counter() - begin], **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    """Both trees by turns, then a table and a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True, help="commit to compare with")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each")
    parser.add_argument("--repeats", type=int, default=1, help="of each call in a process")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "against.json")
    args = parser.parse_args()
    from environment import describe

    found: dict[str, dict[str, list[float]]] = {"old": {}, "new": {}}
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "old"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(old), args.old], cwd=ROOT, check=True)
        try:
            for turn in range(args.rounds):
                pair = (("old", old), ("new", ROOT))
                for which, source in pair if turn % 2 == 0 else pair[::-1]:
                    for name, seconds in timed(source, args.repeats).items():
                        found[which].setdefault(name, []).extend(seconds)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(old)], cwd=ROOT, check=True)
    rows = {}
    for name, new in found["new"].items():
        before, now = statistics.median(found["old"][name]), statistics.median(new)
        runs = {which: [round(each, 3) for each in found[which][name]] for which in found}
        rows[name] = {"old": before, "new": now, "ratio": now / before, "runs": runs}
        print(f"{name:<26} old {before:7.2f} s   new {now:7.2f} s   new/old {now / before:.2f}")
    args.out.write_text(json.dumps({"old": args.old, "environment": describe(), "seconds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
