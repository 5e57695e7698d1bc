"""Write docs/methods.md from the registry: `python docs/gen_catalogue.py`, or `--check` to compare only."""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import torch
import transformers as T

sys.path.insert(0, str(Path(__file__).parent))

import peers
from docstrings import Docstring

import smidgen.methods
import smidgen.methods.base
import smidgen.recipe.named_recipes
from smidgen.common.errors import SmidgenError
from smidgen.methods.base import Method, adds, trains_in_place
from smidgen.planning.plans import Plan
from smidgen.planning.resolution import resolve
from smidgen.planning.saved_layout import safetensors_size
from smidgen.recipe.named_recipes import NAMED
from smidgen.recipe.recipe import Term
from smidgen.sites.discovery import find_sites
from smidgen.sites.site import Site
from smidgen.sites.sublayers import SUBLAYERS
from smidgen.sites.targeting import LINEAR_ROLES
from smidgen.steps.optimizer_groups import HEAD_LR

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
`sm.optimizer` use when no `lr` is given; the head's own is {rate}. Bytes are those of a delta's safetensors file for
BERT-base with a head of two labels, which takes {head:,} alone.
A method of your own takes [ten minutes](new-method.md).

`+` puts methods together: `LN() + LoRA(rank=4)`. Two methods that would train the same tensor are refused.

"""
PORTS = """
## Where methods act

| method | paper | port | places on BERT-base | file, bytes |
|---|---|---|---|---:|
"""
PEERS = """
## Other libraries

Read in their sources at the versions above the columns; what PEFT has is compared with its registry by the tests.
A dash means: looked for and not found.

"""
LAYERS = """
## Fields that several methods have

`layers` picks blocks, counted within each stack from its input: `None` is all, `3` one, `(0, 5)` some, `"2:5"` a range,
`"top:2"` and `"bottom:2"` the ends. Models that use one block at every depth (ALBERT) refuse it.

`stack`, given by keyword, keeps a method to one part of a model: a module by its path or the end of it, such as
`stack="language_model"` or `stack="encoder"`; several stand in brackets, `stack=("encoder", "decoder")`.

Roles are `query`, `key`, `value`, `attention_out`, `ff_in`, `ff_out`. They name the same part in every model;
a fused projection (GPT-2, Phi-3, ModernBERT) is edited by slices.
"""


@cache
def built(model: str) -> torch.nn.Module:
    """A model of real size without content."""
    with torch.device("meta"):
        return MODELS[model]()


@cache
def planned(what: Method | str, model: str) -> Plan | str:
    """The plan of a method or recipe on a model, or why there is none."""
    try:
        return resolve(built(model), what)
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
    return f"{cls.lr if trains_in_place(cls) or adds(cls) else HEAD_LR:g}"


def merging(cls: type[Method]) -> str:
    """Whether and how the method folds away, in words."""
    plan = planned(cls(), "BERT-base")
    rows = () if isinstance(plan, str) else plan.entries
    if why := next((why for row in rows if row.added and (why := row.method.unmergeable(row.site))), None):
        return f"no: {why}"
    if hasattr(cls, "merge"):
        return "yes, into the weight"
    return "yes, trained values replace the base's" if trains_in_place(cls) else "yes, nothing is added"


def places(method: Method) -> list[str]:
    """Where the method acts on BERT-base: module paths with `*` for the layer, how many, shapes."""
    plan = planned(method, "BERT-base")
    if isinstance(plan, str):
        return [f"BERT-base: nothing ({plan})"]
    rows: Counter[str] = Counter()
    for row in plan.entries:
        terms = ", ".join(f"{term} {tuple(shape)}" for term, shape in row.terms)
        path = re.sub(r"[.]\d+[.]", ".*.", row.site.name)
        place = f"`{path}`" if path else f"shared, {', '.join(row.site.roles)}"
        rows[f"{place}: {terms or 'none of its own'}"] += 1
    lines = [f"{number} x {text}" for text, number in rows.items()]
    shown = lines if len(lines) <= 9 else [*lines[:8], f"and {len(lines) - 8} more kinds of place"]
    return shown or ["no place of its own: only the head is trained"]


def port(cls: type[Method]) -> str:
    """The ports that a method uses, by the table of functions in smidgen.methods.base."""
    rows = re.findall(r"^\| `(\w+)\(.*?\)` \|.*\| (\w+) \|$", smidgen.methods.base.__doc__ or "", re.MULTILINE)
    own = {function for function, _ in rows if getattr(cls, function, None) is not getattr(Method, function, None)}
    return ", ".join(dict.fromkeys(name for function, name in rows if function in own)) or "-"


def parts(method: Method) -> str:
    """The kinds of place that a method acts at on BERT-base, by role where there is one."""
    plan = planned(method, "BERT-base")
    sites = [] if isinstance(plan, str) else [row.site for row in plan.entries if not row.owns_shared]
    found = (sorted(site.roles & set(LINEAR_ROLES)) or [_kind(site)] for site in sites)
    return ", ".join(dict.fromkeys(name for names in found for name in names)) or "-"


def _kind(site: Site) -> str:
    return f"{site.kind} sublayer" if site.kind in SUBLAYERS else site.kind


def size(what: Method | str, form: str = "{:,}") -> str:
    """Bytes of a delta's file on BERT-base, head included."""
    plan = planned(what, "BERT-base")
    return "-" if isinstance(plan, str) else form.format(plan.file_bytes)


def head_bytes() -> int:
    """Bytes of a file that holds BERT-base's head alone."""
    plans = (planned(cls(), "BERT-base") for cls in methods())
    return next(safetensors_size(dict(plan.head)) for plan in plans if not isinstance(plan, str))


def citation(cls: type[Method]) -> str:
    """The first paper that a docstring names: arXiv number and section."""
    match = re.search(r"arXiv:(\d{4}\.\d{4,5})(?:, (section [\d.]+))?", " ".join(Docstring.of(cls).paper.split()))
    if match is None:
        return "-"
    where = f", {match[2].rstrip('.')}" if match[2] else ""
    return f"[{match[1]}](https://arxiv.org/abs/{match[1]}){where}"


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
    lines = [f"## {cls.__name__}", "", doc.summary, "", linked(doc.paper), "", "```text", doc.formula, "```", ""]
    for name in ("Shapes", "Fields"):
        if text := doc.sections.get(name):
            lines += [f"**{name}**", "", "```text", text, "```", ""]
    lines += ["**Where, on BERT-base**", "", *(f"- {place}" for place in places(method)), ""]
    facts = {"Spelling": spelling(cls)}
    facts |= {"Default rate": rate(cls), "Merges": merging(cls)}
    facts |= {"Port": port(cls), "Saves": size(method, "{:,} bytes on BERT-base, head included")}
    facts |= {"Other libraries": elsewhere(cls)}
    facts |= {f"Excused from `{check}`": why for check, why in cls.exceptions.items()}
    if rest := resting(method):
        facts["May stand still"] = rest
    facts["Departures"] = " ".join(doc.sections.get("Departures", "none stated").split())
    return "\n".join([*lines, *(f"- {name}: {text}" for name, text in facts.items()), ""])


def spelling(cls: type[Method]) -> str:
    """The call with every field at its default."""
    fields = [f for f in inspect.signature(cls).parameters.values() if f.kind is not f.KEYWORD_ONLY]  # all have stack
    return f"`{cls.__name__}({', '.join(f'{f.name}={f.default!r}' for f in fields)})`"


def table() -> str:
    """One line for each method."""
    lines = [f"| method | default rate | {' | '.join(MODELS)} | merges |", "|---|---|" + "---:|" * len(MODELS) + "---|"]
    for cls in methods():
        counts = " | ".join(count(cls(), model) for model in MODELS)
        name = f"[`{cls.__name__}()`](#{cls.__name__.lower()})"
        lines.append(f"| {name} | {rate(cls)} | {counts} | {merging(cls).partition(',')[0].partition(':')[0]} |")
    return "\n".join(lines) + "\n"


def ports() -> str:
    """Paper, port, places and bytes of each method."""
    lines = [
        f"| `{cls.__name__}()` | {citation(cls)} | {port(cls)} | {parts(cls())} | {size(cls())} |" for cls in methods()
    ]
    return PORTS + "\n".join(lines) + "\n"


def in_peers() -> str:
    """Which other libraries have each method, and each recipe with a name."""
    lines = [f"| method or recipe | {' | '.join(peers.heads())} |", "|---" * (1 + len(peers.NAMES)) + "|"]
    rows = [("method", cls.__name__, f"`{cls.__name__}()`") for cls in methods()]
    rows += [("recipe", name, f"`{name}`") for name in NAMED]
    lines += [f"| {shown} | {' | '.join(peers.cells(kind, name))} |" for kind, name, shown in rows]
    return PEERS + "\n".join(lines) + "\n"


def elsewhere(cls: type[Method]) -> str:
    """Which other libraries have the method, in one line."""
    cells = zip(peers.heads(), peers.cells("method", cls.__name__), strict=True)
    found = [f"{head}: {cell}" for head, cell in cells if cell not in ("", "-")]
    return "; ".join(found) or "in none of the libraries looked at"


def named() -> str:
    """The recipes with a name: paper, what each trains on BERT-base, and the bytes of its file."""
    lines = ["", "## Recipes with a name", "", "`parse` and `--recipe` read the name as the sum; no brackets.", ""]
    lines += ["| name | recipe | paper | BERT-base | file, bytes |", "|---|---|---|---:|---:|"]
    papers = sources()
    for name, spelled in NAMED.items():
        plan = resolve(built("BERT-base"), name)
        counted = f"{plan.trained:,} ({plan.share:.3%}) | {plan.file_bytes:,}"
        lines.append(f"| `{name}` | `{spelled}` | {papers[name]} | {counted} |")
    return "\n".join(lines) + "\n"


def sources() -> dict[str, str]:
    """Name of a recipe -> its paper: the comment above it in smidgen.recipe.named_recipes, up to a semicolon."""
    found, comment = {}, ""
    for line in inspect.getsource(smidgen.recipe.named_recipes).splitlines():
        if match := re.match(r"\s+# (.*)", line):
            comment += " " + match[1]
        elif match := re.match(r'\s+"(\w+)":', line):
            found[match[1]], comment = linked(comment.partition(";")[0].strip()), ""
    return found


def linked(text: str) -> str:
    """A text with its arXiv numbers as links."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def text() -> str:
    """The whole page."""
    header = HEADER.format(rate=HEAD_LR, head=head_bytes())
    tables = header + table() + ports() + LAYERS + named() + in_peers()
    return tables + "\n" + "\n".join(section(cls) for cls in methods())


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
