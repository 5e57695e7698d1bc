"""Write docs/defaults.md from benchmarks/results/defaults*.json; `--check` compares only."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import defaults  # noqa: E402

PAGE = Path(__file__).with_name("defaults.md")
RESULTS = ROOT / "benchmarks" / "results"
FILES = {"MiniLM": "defaults.json", "SmolLM2-135M": "defaults-smollm2.json"}
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


def section(name: str, file: str) -> str:
    """The table of a model, with what it was measured on."""
    content = json.loads((RESULTS / file).read_text())
    model = content["options"]["model"]
    command = f"python benchmarks/defaults.py --model {model} --out benchmarks/results/{file}"
    later = [
        f"{', '.join(f'`{arm}`' for arm in a)}: {where}." for where, a in defaults.elsewhere(content["runs"]).items()
    ]
    made = " ".join([f"{defaults.made_on(content)}.", *later])
    return f"## {name}\n\n`{command}`; {made}\n\n{defaults.table(content['runs'])}\n"


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
