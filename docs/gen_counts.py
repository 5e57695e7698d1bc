"""Write the table of counts in docs/layernorm.md: `python docs/gen_counts.py`, or `--check` to compare only."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.architectures import CASES

import smidgen.methods  # noqa: F401  (fills the registry)
from smidgen.common.errors import PlanError
from smidgen.planning.resolution import resolve
from smidgen.sites.discovery import find_sites, roles_found

PAGE = Path(__file__).with_name("layernorm.md")
START, END = "<!-- counts: written by docs/gen_counts.py -->", "<!-- end of counts -->"
PARTS = ("attention", "output", "embedding", "final", "qk")
NAMES = (
    "bert-base", "bert-large", "minilm-l6", "roberta-base", "electra-small", "mpnet-base", "distilbert", "albert-base",
    "deberta-v3-base", "modernbert-base", "xlnet-base", "gpt2", "gpt2-medium", "gpt-j-6b", "pythia-70m", "opt-125m",
    "bloom-560m", "falcon-7b", "phi-1.5", "phi-3-mini", "llama-7b", "qwen2-0.5b", "qwen3-0.6b", "gemma-7b",
    "gemma2-2b", "gemma3-1b", "olmo-1b", "olmo2-1b", "mixtral-8x7b", "mamba-130m", "t5-base", "bart-base",
    "whisper-tiny", "clip-vit-b32", "siglip-base", "vit-base", "dinov2-base", "swin-tiny", "convnext-tiny",
    "wav2vec2-base", "resnet-50",
)  # fmt: skip


def row(name: str) -> str:
    """One architecture: class, parameters, values of LN() and their share, number of norms of each role."""
    model = CASES[name].build()
    sites = find_sites(model)
    norms = [site for site in sites if site.kind == "norm"]
    parts = " / ".join(str(sum(part in site.roles for site in norms)) for part in PARTS)
    every = sum(p.numel() for p in model.parameters())
    try:
        plan = resolve(model, "LN()")
        trained = f"{plan.trained:,} | {plan.share:.4%}"
    except PlanError:
        trained = "none to tune | -"
    biases = "gain, bias" if any(site.bias for site in norms) else "gain" if norms else "-"
    assert norms or "norm" not in roles_found(sites)
    return f"| {name} | {CASES[name].model} | {every:,} | {trained} | {biases} | {parts} |"


def table() -> str:
    """The table of all architectures."""
    lines = [
        "| configuration | class | parameters | `LN()` | share | terms | attention / output / embedding / final / qk |",
        "|---|---|---:|---:|---:|---|---:|",
    ]
    return "\n".join([*lines, *map(row, NAMES)])


def text(page: str) -> str:
    """The page with its table written again."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{table()}\n\n{END}{after}"


def main() -> int:
    """Write the page, or with --check say whether it is current."""
    page = PAGE.read_text()
    wanted = text(page)
    if "--check" in sys.argv:
        print(f"{PAGE.name} is {'current' if page == wanted else 'out of date: run python docs/gen_counts.py'}")
        return int(page != wanted)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
