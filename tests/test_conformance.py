"""Every registered method x every tiny model x every check; then sums of methods."""

import pytest

from smidgen.methods.base import Method
from smidgen.recipe.recipe import Term, parse
from smidgen.testing.suite import CHECKS, MODELS, SLOW, applies, check_method, run_check

FEW = {"MoS": {"rank": 3}}  # the default needs three layers, the tiny models have two
METHODS = [cls(**FEW.get(name, {})) for name, cls in sorted(Term.registry.items()) if issubclass(cls, Method)]
SUMS = [
    parse(text)
    for text in (
        "LN() + LoRA(rank=2, target='linear')",
        "LoRA(rank=2, target='linear') + IA3() + LN(which='output')",
        "IA3() + LoRA(rank=2, target=('ff_out', 'value')) + IA3(layers='top:1')",
        "LN(terms='gain') + LoRA(rank=4, alpha=1.5, target='query', layers=0, exclude='value')",
        "LoRA(rank=4, alpha=8, scaling='rslora', lr_ratio=16)",
        "LN() | Select('random', keep=0.3)",
        "LoRA(rank=2, target='linear') + IA3() | Select('random', keep=0.5)",
        "(Full() | Select('magnitude', keep=200, scope='tensor')) + LoRA(rank=2)",
        "MoS(rank=3, shards=2) + LN()",
        "MoS(rank=2, equivalent=2, private=2, shards=1, target='query')",
        "TriAdaptLoRA(rank=4, orthogonality=0.5) + LoFiT() + LN()",
        "LN() + Compacter(width=8, blocks=2, site='attention', layers=1) + Compacter(width=8, rank=2)",
    )
]


PAIRS = [(check, model) for check in CHECKS for model in MODELS if (check, model) not in SLOW]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(("check", "model"), PAIRS)
def test_method(check, method, model):
    if not applies(method, model):
        pytest.skip(f"{method} has nothing to act on in {model}")
    if type(method).__name__ == "Head" and model != "bert":
        pytest.skip("no head to train")
    if type(method).__name__ == "Head" and check == "acts":
        pytest.skip("adds nothing")
    run_check(check, method, model)


@pytest.mark.parametrize("recipe", SUMS, ids=str)
@pytest.mark.parametrize(("check", "model"), [pair for pair in PAIRS if pair[0] != "docstring_is_true"])
def test_sum(check, recipe, model):
    run_check(check, recipe, model)


def test_registry_is_not_empty():
    assert {"LN", "BitFit", "Full", "Head", "IA3", "LoRA"} <= set(Term.registry)
    assert len(CHECKS) >= 18


def test_check_method_runs_the_whole_suite():
    assert check_method("LN(which='output')") == len(PAIRS)
