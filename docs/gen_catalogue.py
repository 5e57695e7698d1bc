"""Write docs/methods.md from the registry: `python docs/gen_catalogue.py`, or `--check` to compare only."""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers as T

import smidgen.methods  # noqa: F401  (fills the registry)
from smidgen.errors import SmidgenError
from smidgen.method import Method
from smidgen.named import NAMED
from smidgen.optim import HEAD_LR
from smidgen.plan import Plan, resolve
from smidgen.recipe import Term
from smidgen.sites import find_sites

PAGE = Path(__file__).with_name("methods.md")
T5 = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
MODELS = {
    "BERT-base": lambda: T.BertForSequenceClassification(T.BertConfig()),
    "GPT-2": lambda: T.GPT2LMHeadModel(T.GPT2Config()),
    "T5-base": lambda: T.T5ForConditionalGeneration(T.T5Config(**T5)),
    "Llama-7B": lambda: T.LlamaForCausalLM(T.LlamaConfig()),
}
HEADER = """<!-- Written by docs/gen_catalogue.py from the docstrings and fields of the methods; edit those. -->

# Catalogue of methods

Counts are trained values, the task's head apart, with every field at its default. They are counted on the meta device
(no weights are needed): `python docs/gen_catalogue.py` writes this page again. Rates are what `fit` and
`sm.optimizer` use when no `lr` is given; the head's own is {rate}.
A method of your own takes [ten minutes](new-method.md).

`+` puts methods together: `LN() + LoRA(rank=4)`. Two methods that would train the same tensor are refused.

"""
LAYERS = """
## Fields that several methods have

`layers` picks blocks, counted within each stack from its input: `None` is all, `3` one, `(0, 5)` some, `"2:5"` a range,
`"top:2"` and `"bottom:2"` the ends. Models that use one block at every depth (ALBERT) refuse it.

Roles are `query`, `key`, `value`, `attention_out`, `ff_in`, `ff_out`. They name the same part in every model;
a fused projection (GPT-2, Phi-3, ModernBERT) is edited by slices.
"""


@dataclass(frozen=True)
class Docstring:
    """The parts of a method's docstring."""

    summary: str
    paper: str
    formula: str
    sections: dict[str, str]

    @classmethod
    def of(cls, method: type[Method]) -> Docstring:
        """Paragraphs apart: indented ones are the formula, those that begin with `Name:` are sections."""
        summary, *paragraphs = inspect.cleandoc(method.__doc__ or "").split("\n\n")
        paper, formula, sections = [], [], {}
        for text in paragraphs:
            # one paragraph may hold several sections
            for part in re.split(r"\n(?=[A-Z][a-z]+:)", text.strip("\n")):
                if part.startswith(" "):
                    formula.append(inspect.cleandoc(part))
                elif match := re.match(r"(Shapes|Fields|Departures):\s*", part):
                    sections[match.group(1)] = inspect.cleandoc(part[match.end() :])
                else:
                    paper.append(part)
        return cls(summary, "\n\n".join(paper), "\n".join(formula), sections)


@cache
def built(model: str) -> torch.nn.Module:
    """A model of real size without content."""
    with torch.device("meta"):
        return MODELS[model]()


@cache
def planned(method: Method, model: str) -> Plan | str:
    """The plan of a method on a model, or why there is none."""
    try:
        return resolve(built(model), method)
    except SmidgenError as error:
        return str(error)


def methods() -> list[type[Method]]:
    """The library's own methods, by name."""
    found = [cls for cls in Term.registry.values() if issubclass(cls, Method)]
    return sorted((cls for cls in found if cls.__module__.startswith("smidgen.methods.")), key=lambda c: c.__name__)


def count(method: Method, model: str) -> str:
    """Trained values and their share, or a dash where the method has nothing to act on."""
    plan = planned(method, model)
    return "-" if isinstance(plan, str) else f"{plan.trained:,} ({plan.share:.3%})"


def rate(cls: type[Method]) -> str:
    """The default learning rate; the head's for a method that trains nothing else."""
    return f"{cls.lr if cls.overrides('trains') or cls.overrides('acts') else HEAD_LR:g}"


def merging(cls: type[Method]) -> str:
    """Whether and how the method folds away, in words."""
    plan = planned(cls(), "BERT-base")
    rows = () if isinstance(plan, str) else plan.rows
    if why := next((why for row in rows if row.added and (why := row.method.unmergeable(row.site))), None):
        return f"no: {why}"
    if cls.overrides("merge"):
        return "yes, into the weight"
    return "yes, trained values replace the base's" if cls.overrides("trains") else "yes, nothing is added"


def places(method: Method) -> list[str]:
    """Where the method acts on BERT-base: module paths with `*` for the layer, how many, shapes."""
    plan = planned(method, "BERT-base")
    if isinstance(plan, str):
        return [f"BERT-base: nothing ({plan})"]
    rows: Counter[str] = Counter()
    for row in plan.rows:
        terms = ", ".join(f"{term} {tuple(shape)}" for term, shape in row.terms)
        path = re.sub(r"[.]\d+[.]", ".*.", row.site.name)
        rows[f"`{path}`: {terms}"] += 1
    lines = [f"{number} x {text}" for text, number in rows.items()]
    shown = lines if len(lines) <= 9 else [*lines[:8], f"and {len(lines) - 8} more kinds of place"]
    return shown or ["no place of its own: only the head is trained"]


def resting(method: Method) -> str:
    """What may stand still in training, on BERT-base, with the reason that the method's file gives."""
    sites = find_sites(built("BERT-base"))
    if not any(method.may_rest(site, term) for site in sites for term in method.trains(site) or ("",)):
        return ""
    comments = re.findall(r"#\s*(.+)", inspect.getsource(type(method).may_rest))
    return " ".join(comments) or "yes"


def section(cls: type[Method]) -> str:
    """One method."""
    method, doc = cls(), Docstring.of(cls)
    paper = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", doc.paper)
    lines = [f"## {cls.__name__}", "", doc.summary, "", paper, "", "```text", doc.formula, "```", ""]
    for name in ("Shapes", "Fields"):
        if text := doc.sections.get(name):
            lines += [f"**{name}**", "", "```text", text, "```", ""]
    lines += ["**Where, on BERT-base**", "", *(f"- {place}" for place in places(method)), ""]
    facts = {"Spelling": spelling(cls)}
    facts |= {"Default rate": rate(cls), "Merges": merging(cls)}
    facts |= {f"Excused from `{check}`": why for check, why in cls.exceptions.items()}
    if rest := resting(method):
        facts["May stand still"] = rest
    facts["Departures"] = " ".join(doc.sections.get("Departures", "none stated").split())
    return "\n".join([*lines, *(f"- {name}: {text}" for name, text in facts.items()), ""])


def spelling(cls: type[Method]) -> str:
    """The call with every field at its default."""
    fields = inspect.signature(cls).parameters.values()
    return f"`{cls.__name__}({', '.join(f'{f.name}={f.default!r}' for f in fields)})`"


def table() -> str:
    """One line for each method."""
    lines = [f"| method | default rate | {' | '.join(MODELS)} | merges |", "|---|---|" + "---:|" * len(MODELS) + "---|"]
    for cls in methods():
        counts = " | ".join(count(cls(), model) for model in MODELS)
        name = f"[`{cls.__name__}()`](#{cls.__name__.lower()})"
        lines.append(f"| {name} | {rate(cls)} | {counts} | {merging(cls).partition(',')[0].partition(':')[0]} |")
    return "\n".join(lines) + "\n"


def named() -> str:
    """The recipes with a name, and what each trains on BERT-base."""
    lines = ["", "## Recipes with a name", "", "`parse` and `--recipe` read the name as the sum; no brackets.", ""]
    lines += ["| name | recipe | BERT-base |", "|---|---|---:|"]
    for name, spelled in NAMED.items():
        plan = resolve(built("BERT-base"), name)
        lines.append(f"| `{name}` | `{spelled}` | {plan.trained:,} ({plan.share:.3%}) |")
    return "\n".join(lines) + "\n"


def text() -> str:
    """The whole page."""
    return (
        HEADER.format(rate=HEAD_LR) + table() + LAYERS + named() + "\n" + "\n".join(section(cls) for cls in methods())
    )


def main() -> int:
    """Write the page, or with --check say whether it is current."""
    wanted = text()
    if "--check" in sys.argv:
        current = PAGE.is_file() and PAGE.read_text() == wanted
        print(f"{PAGE.name} is {'current' if current else 'out of date: run python docs/gen_catalogue.py'}")
        return 0 if current else 1
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
