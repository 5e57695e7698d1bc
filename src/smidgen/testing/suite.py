"""The conformance suite, shipped: what every method must do, on every kind of model.

    from smidgen.testing import check_method
    check_method(MyMethod())            # raises AssertionError naming check, model and what was found

Models are tiny, in float64, with shaken biases and gains: the zeros and ones of fresh models hide half the mathematics.
"""

from __future__ import annotations

import smidgen.testing.checks  # noqa: F401  (fills CHECKS)
from smidgen.recipe.recipe import Recipe, Term
from smidgen.testing.cases import CHECKS, MODELS, SLOW, Case, applies, case, check, shake, tiny

__all__ = [
    "CHECKS",
    "MODELS",
    "Case",
    "applies",
    "case",
    "check",
    "check_method",
    "run_check",
    "shake",
    "tiny",
]


def excused(recipe: Recipe, name: str) -> str | None:
    """The reason that a method of the recipe declares for an exception from a check."""
    reasons = (getattr(term, "exceptions", {}).get(name) for term in recipe)
    return next((reason for reason in reasons if reason), None)


def run_check(name: str, recipe: str | Term | Recipe, model: str) -> None:
    """One check on one model. An excused method must fail it: an exception that is not needed is an error too."""
    subject = case(recipe, model)
    reason = excused(subject.recipe, name)
    try:
        CHECKS[name](subject)
    except AssertionError as error:
        if reason is None:
            raise AssertionError(f"{subject.recipe} on {model} fails {name}: {error}") from error
        return
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise AssertionError(f"{subject.recipe} on {model} fails {name}: {what}") from error
    if reason is not None:
        raise AssertionError(f"{subject.recipe} on {model} passes {name}, yet declares an exception: {reason}")


def check_method(method: str | Term | Recipe) -> int:
    """Run the whole suite on every tiny model that the method applies to; returns the number of checks run.

    Raises:
        AssertionError: at the first check that fails, or if the method applies to no model at all.
    """
    models = [name for name in MODELS if applies(method, name)]
    assert models, f"{method} applies to none of {', '.join(MODELS)}"
    pairs = [(name, model) for name in CHECKS for model in models if (name, model) not in SLOW]
    for name, model in pairs:
        run_check(name, method, model)
    return len(pairs)
