"""The catalogue: nothing on the page is typed in, facts on other libraries are theirs, counts have closed forms."""

import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as T

import smidgen as sm
from smidgen.methods.base import Method
from smidgen.planning.resolution import resolve
from smidgen.recipe.named_recipes import NAMED
from smidgen.recipe.recipe import Term

DOCS = Path(__file__).parents[1] / "docs"
METHODS = sorted(n for n, c in Term.registry.items() if c.__module__.startswith("smidgen.methods."))


@pytest.fixture(scope="module")
def catalogue():
    sys.path.insert(0, str(DOCS))
    try:
        import gen_catalogue
    finally:
        sys.path.remove(str(DOCS))
    return gen_catalogue


@pytest.fixture(scope="module")
def bert():
    with torch.device("meta"):
        return T.BertForSequenceClassification(T.BertConfig())


def rows(page, heading):
    """First cell -> further cells, of the table under a heading."""
    text = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    return {first: rest for first, *rest in cells}


def test_every_method_has_a_paper_a_port_places_and_bytes(catalogue):
    found = rows(catalogue.text(), "Where methods act")
    assert list(found) == [f"`{name}()`" for name in METHODS]
    for name, (paper, port, places, size) in found.items():
        assert re.match(r"\[\d{4}\.\d{4,5}\]\(https://arxiv.org/abs/\S+\), section \d", paper), name
        plan = resolve(catalogue.built("BERT-base"), name.strip("`"))
        assert size == f"{plan.file_bytes:,}"
        assert ("-" in (port, places)) == (not plan.entries), name


def test_every_named_recipe_has_a_paper(catalogue):
    found = rows(catalogue.text(), "Recipes with a name")
    assert list(found) == [f"`{name}`" for name in NAMED]
    for name, (_, paper, trained, _) in found.items():
        assert re.search(r"\d{4}, \[arXiv:\d{4}\.\d{5}\]\(.*\), (section|its) ", paper), name
        assert trained.startswith(f"{resolve(catalogue.built('BERT-base'), name.strip('`')).trained:,} ")


def test_a_new_method_needs_no_line_of_the_generator(catalogue, monkeypatch):
    @dataclass(frozen=True)
    class Nudge(sm.Method, abstract=True):
        """Shift the output of every value map.

        Nobody 2026, No Paper, arXiv:2601.00001, section 7.

            y = W x + b + t

        Shapes:
            t: (width_out,)  zeros

        Departures: none.
        """

        def acts(self, site):
            return "value" in site.roles

        def init(self, site):
            return {"t": torch.zeros(site.width_out)}

        def after(self, p, x, y, site):
            return y + p["t"]

    Nudge.__module__ = "smidgen.methods.nudge"
    monkeypatch.setattr(Term, "registry", {**Term.registry, "Nudge": Nudge})
    page = catalogue.text()
    assert rows(page, "Where methods act")["`Nudge()`"][1:3] == ["module", "value"]
    assert "| [`Nudge()`](#nudge) | 0.001 | 9,216 (0.008%) |" in page
    assert rows(page, "Other libraries")["`Nudge()`"][0] == "not looked up"


def test_the_generator_names_no_method(catalogue):
    code = Path(catalogue.__file__).read_text().replace(catalogue.HEADER, "")
    assert [name for name in METHODS if re.search(rf"\b{name}\(", code)] == []


# Other libraries


def test_who_has_a_method_is_known_or_said_not_to_be(catalogue):
    found = rows(catalogue.text(), "Other libraries")
    assert list(found) == [*(f"`{name}()`" for name in METHODS), *(f"`{name}`" for name in NAMED)]
    for kind, name in [*(("method", name) for name in METHODS), *(("recipe", name) for name in NAMED)]:
        cells = found[f"`{name}()`" if kind == "method" else f"`{name}`"]
        assert (cells[0] == "not looked up") == (name not in catalogue.peers.facts()[kind])


def wrong(facts):
    """What the table says of PEFT that PEFT's registry does not: types, switches, and types of a method's own name."""
    peft = pytest.importorskip("peft")
    configs = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    types = {kind.name: kind for kind in configs}
    for name, row in facts["method"].items():
        kind, field = row.get("peft"), row.get("peft_field")
        if kind is not None and kind not in types:
            yield f"{name}: PEFT has no {kind}"
        elif field and field not in {f.name for f in dataclasses.fields(configs[types[kind]])}:
            yield f"{name}: {kind} has no {field}"
        own = {name.upper(), re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper()}
        if kind is None and (missed := own & set(types)):
            yield f"{name}: PEFT has {missed}"


@pytest.mark.filterwarnings("ignore")  # peft's own, at import
def test_peft_has_what_the_table_says(catalogue):
    facts = catalogue.peers.facts()
    assert list(wrong(facts)) == []
    broken = {
        "LoRA": {},
        "LN": {"peft": "LAYER_NORM"},
        "DoRA": {"peft": "LORA", "peft_field": "dora"},
        "PromptTuning": {},
    }
    assert len(list(wrong({"method": broken}))) == 4


def test_a_mistyped_fact_is_an_error(catalogue, monkeypatch):
    monkeypatch.setattr(catalogue.peers, "facts", lambda: {"method": {"LN": {"pfet": "LN_TUNING"}}})
    with pytest.raises(ValueError, match=r"method.LN has \['pfet'\]; known are"):
        catalogue.peers.cells("method", "LN")


# Counts against their closed forms

L, D, F, H = 12, 768, 3072, 12  # BERT-base and ViT-B/16: blocks, width, inner width, heads
CLOSED = {
    "LN()": (2 * L + 1) * 2 * D,
    "BitFit()": L * (4 * D + F + D + 2 * D) + D + D,  # embedding norm, pooler
    "LoRA(rank=8)": L * 2 * 8 * (D + D),
    "IA3()": L * (2 * D + F),
    "SSF()": L * 2 * (4 * D + F + D + 2 * D),
    "Prefix(length=30)": L * 2 * 30 * D,
    "PromptTuning(length=20)": 20 * D,
    "Adapter(width=64)": L * 2 * (2 * 64 * D + 64 + D),
    "Adapter(site='feed_forward', width=64)": L * (2 * 64 * D + 64 + D),
    "Adapter(form='parallel', width=16, scale=4.0)": L * 2 * (2 * 16 * D + 16 + D),
    "MAM": L * (2 * 16 * D + 2 * 16 * D + 16 + D),
    "Houlsby": L * 2 * (2 * 64 * D + 64 + D) + (2 * L + 1) * 2 * D,
    "Pfeiffer": L * (2 * 48 * D + 48 + D),
    "UnifiedLN": (2 * L + 1) * 2 * D + L * 2 * 30 * D + L * (2 * 64 * D + 64 + D),
    "Prefix(length=30, mlp=100)": L * (30 * 100 + 100 * 100 + 100 + 2 * D * 100 + 2 * D),
}


@pytest.mark.parametrize("recipe", CLOSED)
def test_counts_on_bert_base_have_closed_forms(recipe, bert):
    assert resolve(bert, recipe).trained == CLOSED[recipe]


def test_a_prefix_is_saved_without_its_network(bert):
    saved = resolve(bert, "Prefix(length=30, mlp=100)").saved
    head = {"classifier.weight", "classifier.bias"}
    assert sum(torch.Size(shape).numel() for name, shape in saved.items() if name not in head) == L * 2 * 30 * D


def test_ssf_on_vit_b16_has_the_papers_count():
    with torch.device("meta"):
        model = T.ViTForImageClassification(T.ViTConfig())
    plan = resolve(model, "SSF()")
    assert plan.trained == 22 * D * L + 4 * D == 205_824
    assert [row.site.path for row in plan.entries if "patch" in row.site.path] == [
        "vit.embeddings.patch_embeddings.projection"
    ]
    assert resolve(model, "SSF(convs=False)").trained == 205_824 - 2 * D


def test_the_methods_of_the_catalogue_are_methods():
    assert all(issubclass(Term.registry[name], Method) for name in METHODS)
