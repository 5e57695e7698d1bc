"""Write docs/models.md from the results of the sweeps: `python docs/gen_models.py`; `--check` compares only."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("models.md")
RESULTS = ROOT / "benchmarks" / "results" / "sweep.json"
LOW = {dtype: RESULTS.with_name(f"sweep-{dtype}.json") for dtype in ("bfloat16", "float16")}
WORDS = {"ok": "yes", "partly": "partly", "refused": "no", "stopped": "stops", "wrong": "wrong", "crash": "breaks"}
HEADER = """<!-- Written by docs/gen_models.py from benchmarks/results/sweep*.json; run the sweeps, then this. -->

# Models

{built} of {pairs} pairs of a model type and one of its classes in transformers {transformers} were built here as tiny
random models ({types} types; `python benchmarks/sweep.py`, source {source}, {dtype}), and each method was put on each:
attached, started as the identity where it should, one backward pass in which every trained tensor got a finite
gradient, changed values that change the output, merged the same as attached, detached bit for bit, the delta attached
again.

- **yes**: all of that holds, and nothing of what the method's words cover was found left out.
- **partly**: it holds, and what the note names is left out.
- **no**: refused before training, with the note's reason.
- **with stack=...**: other parts of the model do not run on the inputs given here, such as text alone; training stops
  with an error that names this stack, and the verdict is of the recipe on it.
- **stops**: attached, and stopped with the note's reason in the first steps.
- **wrong**, **breaks**: a fault of smidgen; none is wanted.

Numbers in brackets are notes, below. A type stands on several lines where its classes differ.
A method in a sum acts as it does alone. What a model of real size needs (memory, a tokenizer) is not seen here.

"""


LOW_HEADER = """The same with the base in a dtype of two bytes, as `from_pretrained(dtype=...)` leaves it, and the
trained values in float32 (`python benchmarks/sweep.py --dtype bfloat16`, on the CPU). The start may be off by what
rounding leaves: 0.05 of the largest output, or as much as the untouched model's own output moves where its weights are
moved by half a unit in their last place, which in a mixture of experts may choose another expert. Merged models are not
compared. A model that is not built does not run in this dtype itself; "built" says of how many pairs it was tried.
"""


def method(recipe: str) -> str:
    """`LoRA(rank=2)` -> `LoRA`: without what only makes it tiny."""
    return re.sub(r"\(\)", "", re.sub(r"(rank|width|blocks|length)=\d+(, )?", "", recipe))


class Notes:
    """Reasons by number, in order of their first use."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        """The number of a reason."""
        return self.numbers.setdefault(text, len(self.numbers) + 1)

    def lines(self) -> list[str]:
        """The notes as a numbered list."""
        return [f"{number}. {text}" for text, number in self.numbers.items()]


def shown(reason: str, cls: str) -> str:
    """A reason without what differs from model to model: class name, counts, figures, layer numbers."""
    text = reason.replace(cls, "the model")
    text = re.sub(r"(?<=[. ])\d+(?=[.])", "*", text)
    text = re.sub(r"\b\d+ of \d+ ", "", text)
    text = re.sub(r"\b\d+(\.\d+)?e[-+]?\d+|\b\d+\.\d+", "x", text)
    text = re.sub(r"; (roles found:|sublayers found:|it has|did you mean|narrow the recipe) [^;]*", "", text)
    text = re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= 220 else text[:217] + "..."


def outcome(value: Any) -> dict[str, Any]:
    """A cell as it was before `packed` of the sweep."""
    return dict(zip(("outcome", "why"), value, strict=False)) if isinstance(value, list) else value


def verdict(value: Any, reasons: list[str], cls: str, notes: Notes) -> str:
    """One cell."""
    found = outcome(value)
    word = WORDS[found["outcome"]]
    if "stack" in found:
        word += f", with stack={shown(found['stack'], cls)}"
    return f"{word} ({notes.number(shown(reasons[found['why']], cls))})" if "why" in found else word


def table(content: dict[str, Any], notes: Notes) -> list[str]:
    """One line for each type, and for each group of its classes that differ."""
    recipes = list(content["counts"]["recipes"])
    rows: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for key, result in sorted(content["found"].items(), key=lambda item: item[0].lower()):
        kind, _, cls = key.partition("/")
        if "recipes" in result:
            cells = tuple(verdict(result["recipes"][name], content["reasons"], cls, notes) for name in recipes)
            rows[kind, cells].append(cls)
    lines = [f"| type | classes | {' | '.join(map(method, recipes))} |", "|---" * (len(recipes) + 2) + "|"]
    return lines + [
        f"| `{kind}` | {', '.join(f'`{cls}`' for cls in classes)} | {' | '.join(cells)} |"
        for (kind, cells), classes in rows.items()
    ]


def totals(content: dict[str, Any]) -> list[str]:
    """How many pairs came to which end, by method."""
    counts = content["counts"]["recipes"]
    lines = [f"| method | {' | '.join(WORDS.values())} |", "|---" + "|---:" * len(WORDS) + "|"]
    for recipe, row in counts.items():
        lines.append(f"| `{method(recipe)}` | {' | '.join(str(row[name]) for name in WORDS)} |")
    return lines


def only_low(dtype: str, low: dict[str, Any], wide: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What does not run in a dtype and does in the widest, or ends there in a way that is not wanted: reason, where."""
    unwanted = {name: word for name, word in WORDS.items() if name not in ("ok", "partly", "refused")}
    for key, result in sorted(low["found"].items()):
        cls, before = key.partition("/")[2], wide["found"].get(key, {}).get("recipes", {})
        if "not built" in result and before:
            yield f"{dtype}, not built: {shown(low['reasons'][result['not built']], cls)}", f"`{cls}`"
        for recipe, value in result.get("recipes", {}).items():
            found, was = outcome(value), outcome(before.get(recipe, ["not built"]))
            if found["outcome"] in unwanted and found["outcome"] != was["outcome"]:
                why = shown(low["reasons"][found["why"]], cls)
                yield f"{dtype}, {unwanted[found['outcome']]}: {why}", f"`{method(recipe)}` on `{cls}`"


def low_precision(content: dict[str, Any]) -> list[str]:
    """Counts of verdicts in other dtypes, and what ends there otherwise than in the widest."""
    lines = [LOW_HEADER, f"| dtype | source | built | {' | '.join(WORDS.values())} |"]
    lines.append("|---|---" + "|---:" * (len(WORDS) + 1) + "|")
    other: dict[str, list[str]] = defaultdict(list)
    for dtype, results in LOW.items():
        if not results.is_file():
            lines.append(f"| {dtype} | not run |" + " |" * (len(WORDS) + 1))
            continue
        low = json.loads(results.read_text())
        counts = " | ".join(str(low["counts"]["all"][name]) for name in WORDS)
        lines.append(f"| {dtype} | {low['source']} | {low['counts']['built']} of {low['counts']['pairs']} | {counts} |")
        for reason, where in only_low(dtype, low, content):
            other[reason].append(where)
    lines += ["", "What runs in the widest dtype and does not in these:", ""]
    return lines + [f"- {reason}: {', '.join(places)}" for reason, places in sorted(other.items())]


def unbuilt(content: dict[str, Any]) -> list[str]:
    """Classes that were not built, by reason."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for key, result in sorted(content["found"].items()):
        if "not built" in result:
            cls = key.partition("/")[2]
            by_reason[shown(content["reasons"][result["not built"]], cls)].append(f"`{cls}`")
    return [f"- {reason}: {', '.join(names)}" for reason, names in sorted(by_reason.items())]


def text() -> str:
    """The whole page."""
    content = json.loads(RESULTS.read_text())
    notes = Notes()
    header = HEADER.format(
        built=content["counts"]["built"],
        pairs=content["counts"]["pairs"],
        types=content["counts"]["types"],
        transformers=content["versions"]["transformers"],
        source=content["source"],
        dtype="float64, or float32 where that fails" if content["dtype"] == "float64" else content["dtype"],
    )
    body = table(content, notes)
    low = low_precision(content)
    sections = {
        "Totals": totals(content),
        "Low precision": low,
        "By type": body,
        "Notes": notes.lines(),
        "Not built": unbuilt(content),
    }
    return header + "\n\n".join(f"## {name}\n\n" + "\n".join(lines) for name, lines in sections.items()) + "\n"


def main() -> int:
    """Write the page, or with --check say whether it is current."""
    wanted = text()
    if "--check" in sys.argv:
        current = PAGE.is_file() and PAGE.read_text() == wanted
        print(f"{PAGE.name} is {'current' if current else 'out of date: run python docs/gen_models.py'}")
        return 0 if current else 1
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
