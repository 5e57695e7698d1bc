"""Write docs/defaults.md from benchmarks/results/defaults*.json; `--check` compares only."""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import smidgen.methods  # noqa: F401 (fills the registry)
from smidgen import parse

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("defaults.md")
RESULTS = ROOT / "benchmarks" / "results"
FILES = {"MiniLM": "defaults.json", "SmolLM2-135M": "defaults-smollm2.json"}
POOLINGS = {"mean": "mean of the tokens", "own": "the class's own token"}
HEADER = """<!-- Written by docs/gen_defaults.py from benchmarks/results/defaults*.json. -->

# Defaults, measured

Each method with every field and rate at its default, beside a head alone and full fine-tuning: accuracy on 445 test
articles of BBC news (five topics), mean ± standard deviation over seeds (their number in brackets), of the best epoch
on 100 validation articles. A column's budget is training articles x epochs; texts are cut to 48 tokens; the base is
bfloat16.

*Before* is what the same method did when `LoRA`'s alpha was its rank, all tensors learned at one rate, and rates were
not yet measured. A method is not better than another because of one line here: five topics are easy, and a default
rate is one of many. Blank is a default that has changed since it was measured here.
"""


def cells(runs: list[dict[str, Any]]) -> dict[str, dict[tuple[str, str], str]]:
    """Arm -> block -> mean, deviation and number of runs; of a run made again with other fields the last stands."""
    last = {(run["arm"], run["pooling"], run["budget"], run["seed"]): run for run in runs if _of_today(run)}
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for (arm, pooling, budget, _), run in last.items():
        groups[arm, pooling, budget].append(run)
    table: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    for (arm, pooling, budget), same in groups.items():
        values = [run["accuracy"] for run in same if "accuracy" in run]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        told = f"{statistics.mean(values):.3f}{spread} ({len(values)})" if values else "refused"
        table[arm][pooling, budget] = told
    return table


def _of_today(run: dict[str, Any]) -> bool:
    """Whether a run at default rates had those of today; what has changed since stands blank until it is run again."""
    rates = [each[""] for each in run.get("rates", ()) if isinstance(each, dict)]
    return "lr" in run or not rates or rates == [term.lr * term.rate("") for term in parse(run["recipe"])]


def section(name: str, file: str) -> str:
    """The table of a model, with what it was measured on."""
    content = json.loads((RESULTS / file).read_text())
    table = cells(content["runs"])
    blocks = list(dict.fromkeys((run["pooling"], run["budget"]) for run in content["runs"]))
    firsts = [arm for arm in ("Head()", "Full()") if arm in table]
    arms = [*firsts, *sorted(arm for arm in table if arm not in firsts)]
    lines = ["| arm | " + " | ".join(f"{POOLINGS[p]}, {b}" for p, b in blocks) + " |", "|---" * (1 + len(blocks)) + "|"]
    for arm in arms:
        title = f"`{arm.removesuffix(', before')}`" + (", before" if arm.endswith(", before") else "")
        lines.append(f"| {title} | " + " | ".join(table[arm].get(block, "") for block in blocks) + " |")
    machine, versions = content["machine"], content["versions"]
    where = machine.get("accelerator", f"{machine['cores']} cores")
    model = content["options"]["model"]
    command = f"python benchmarks/defaults.py --model {model} --out benchmarks/results/{file}"
    made = f"{where}, torch {versions['torch']}, transformers {versions['transformers']}, commit {content['commit']}"
    return f"## {name}\n\n`{command}`; {made}.\n\n" + "\n".join(lines) + "\n"


def text() -> str:
    """The whole page."""
    return "\n".join([HEADER, *(section(name, file) for name, file in FILES.items())])


def main() -> int:
    """Write the page, or with --check say whether it is current."""
    wanted = text()
    if "--check" in sys.argv:
        current = PAGE.is_file() and PAGE.read_text() == wanted
        print(f"{PAGE.name} is {'current' if current else 'out of date: run python docs/gen_defaults.py'}")
        return 0 if current else 1
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
