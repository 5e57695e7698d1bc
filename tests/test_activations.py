"""What is saved for the backward pass: counted exactly, and no more than the edits need."""

import importlib
import json
from pathlib import Path

import pytest
import torch

import smidgen as sm

FOLDER = Path(__file__).parents[1] / "benchmarks"
TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 20}
B, S, D, F, H = 3, 8, 16, 32, 2
X = 4 * B * S * D  # bytes of an activation
UP, SUMS, ROWS = 4 * B * S * F, 4 * B * S * H, 4 * B * S  # inner activation; log-sums of attention; mean, deviation


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("activations")


@pytest.fixture
def count(bench):
    def of(recipe=None, break_it=None, layers=4):
        model = bench.build(layers, **TINY)
        if recipe:
            sm.attach(model, recipe)
        if break_it:
            break_it(model)
        return bench.total(bench.saved(model, B, S))

    return of


def thaw(model):
    model.requires_grad_(True)


def leak(model):
    """A gradient that is wanted below the lowest edit."""
    model.bert.embeddings.LayerNorm.bias.requires_grad_(True)


def test_ln_saves_less_than_full(count):
    full = count("Full()")
    assert count("LN()") < 0.75 * full
    assert not count("LN()", thaw) < 0.75 * full, "weights that are not frozen would go unseen"


def test_the_top_layer_saves_a_fraction(count):
    whole = count("LN()")
    assert count("LN(layers='top:1')") < whole / 4
    assert not count("LN(layers='top:1')", leak) < whole / 4, "a gradient below the lowest edit would go unseen"
    assert count("Head()") == X


def test_ln_saves_what_its_formula_needs(count):
    """Inputs of norms (with mean and deviation), of the activation, and what attention keeps: no input of a weight."""
    block = 6 * X + UP + 2 * 2 * ROWS + SUMS
    assert count("LN()") == 4 * block + X + 2 * ROWS + X  # embedding norm, head
    assert count("LN(layers='top:1')") == 2 * X + UP + 2 * 2 * ROWS + X
    assert count("LN()", thaw) > 4 * block + 2 * X + 2 * ROWS


@pytest.mark.parametrize(
    ("recipe", "added"),
    [
        ("IA3()", 2 * X + UP),  # keys, values and the inner activation before they are scaled
        ("SSF(norms=False)", 5 * X + UP),  # the output of every map
        ("SSF()", 7 * X + UP),  # and of every norm
        ("LoRA(rank=2)", X + 2 * 4 * B * S * 2),  # the input, once for query and value; A x
        ("DoRA(rank=2)", 3 * X + 2 * 4 * B * S * 2 + 2 * 2 * 4 * D),  # V x of each as well; |V|, the ratio less 1
    ],
)
def test_what_one_more_layer_saves(recipe, added, count):
    block = 6 * X + UP + 2 * 2 * ROWS + SUMS
    assert count(recipe) - count(recipe, layers=3) == block + added


def test_each_storage_counts_once_and_parameters_not_at_all(bench):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(5))

        def forward(self, ids):
            y = self.w * self.w  # saves the parameter
            return (y * y[:]).sum()  # saves two views of one storage

    assert bench.saved(Twice()) == {20: 1}


def test_the_results_are_what_is_counted(bench):
    result = json.loads((FOLDER / "results/activations.json").read_text())
    if result["versions"]["torch"] != torch.__version__:
        pytest.skip(f"counted with torch {result['versions']['torch']}")
    rows = {row["recipe"]: row["bytes"] for row in result["rows"]}
    assert set(rows) == {*bench.REFERENCE, *bench.OTHERS}
    for recipe in ("LN()", "Head()"):
        assert bench.measure(recipe)["bytes"] == rows[recipe]
    assert bench.after_the_block() == result["after_the_block"]


def test_the_reference_agrees_but_for_the_adapter(bench):
    result = json.loads((FOLDER / "results/activations.json").read_text())
    off = [row["recipe"] for row in result["rows"] if row["reference"] and not close(row["bytes"], row["reference"])]
    assert off == [bench.PFEIFFER]
    assert close(result["after_the_block"], bench.REFERENCE[bench.PFEIFFER])
    assert not close(result["after_the_block"] + 786_432, bench.REFERENCE[bench.PFEIFFER])


def test_the_table_of_the_page_is_the_result():
    result = json.loads((FOLDER / "results/activations.json").read_text())
    page = (FOLDER.parent / "docs/speed.md").read_text().split("### What is kept for the backward pass")[1]
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    every = [f"| `{r['recipe']}` | {r['trained']:,} | {r['bytes'] / 2**20:.2f} |" for r in result["rows"]]
    assert len(lines) == 15
    assert set(lines) <= set(every)
    assert "| `SSF()` | 50,688 | 95.45 |" not in every


def close(count, reference):
    """To the last digit that was printed."""
    return abs(count / 2**20 - reference) <= 0.05 + 1e-9
