"""What the studies' pages say is what their results say."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

UNIFIED = Path(__file__).parents[1] / "studies" / "unified"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(UNIFIED), *sys.path])
    import table as found

    monkeypatch.setattr(found, "DRAWS", 20)  # the intervals are not looked at here
    yield found
    sys.modules.pop("table")


def rows(text):
    return [line.split("|")[1:-2] for line in text.splitlines() if line.startswith("|")]


def test_the_page_has_the_table_of_its_results(table):
    results = json.loads((UNIFIED / "results.json").read_text())
    page = (UNIFIED / "README.md").read_text()
    assert rows(page) == rows(table.render(results))
    results["runs"][-1]["right"] = results["runs"][-2]["right"]
    assert rows(page) != rows(table.render(results))


def test_each_arm_tried_the_same_rates_and_seeds():
    runs = json.loads((UNIFIED / "results.json").read_text())["runs"]
    arms = {}
    for run in runs:
        arms.setdefault((run["task"], run["method"], run["ln"]), []).append((run["seed"], run["lr"]))
    assert len(arms) == 2 * 7 * 2
    for found in arms.values():
        assert {lr for seed, lr in found if seed == 0} == {1e-3, 3e-3, 1e-2}
        assert sorted(seed for seed, _ in found) == [0, 0, 0, 1, 2, 3]
        assert len({lr for seed, lr in found if seed}) == 1


def test_the_interval_of_a_planted_difference_holds_it(table, monkeypatch):
    monkeypatch.setattr(table, "DRAWS", 500)
    rng = np.random.default_rng(0)
    differences = (rng.random((3, 800)) < 0.3).astype(float) - (rng.random((3, 800)) < 0.1)
    low, high = table.interval(differences)
    assert low < 0.2 < high < 0.3
    assert table.right({"right": f"{int('1' + '0110', 2):x}"}).tolist() == [0, 1, 1, 0]
