import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smidgen.common.errors import PlanError, RecipeError
from smidgen.methods.in_place.bitfit import BitFit
from smidgen.methods.in_place.head import Head
from smidgen.methods.in_place.ln import LN, WHICH
from smidgen.methods.low_rank.lora import LoRA
from smidgen.methods.scaling.ia3 import IA3
from smidgen.planning.resolution import resolve
from smidgen.recipe.recipe import OPTIONAL, Recipe, Term, as_recipe, parse, registry
from smidgen.testing.cases import tiny

layers = st.one_of(st.none(), st.integers(0, 40), st.sampled_from(["top:2", "bottom:1", "2:5"]), st.just((0, 5)))
methods = st.one_of(
    st.builds(LN, st.sampled_from(WHICH), st.sampled_from(["both", "gain", "bias"]), layers),
    st.builds(BitFit, st.booleans(), layers),
    st.builds(IA3, layers),
    st.builds(Head),
    st.builds(
        LoRA,
        st.integers(1, 512),
        st.one_of(st.none(), st.floats(0.01, 1e6)),
        st.sampled_from(["linear", "q_proj", ("query", "key")]),
        layers,
        st.sampled_from([(), "value"]),
        st.floats(0, 0.99),
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(methods, min_size=1, max_size=4))
def test_spelling_and_json_round_trip(terms):
    recipe = Recipe(tuple(terms))
    assert parse(str(recipe)) == recipe
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_sum_is_associative_and_spelled_shortly():
    a, b, c = LN(), LoRA(rank=4), BitFit(norms=False)
    assert (a + b) + c == a + (b + c)
    assert str(a + b + c) == "LN() + LoRA(rank=4) + BitFit(norms=False)"
    assert as_recipe("LN()") == as_recipe(LN()) == Recipe((LN(),))


def test_saved_form_lists_every_field():
    fields = {"rank", "alpha", "target", "layers", "exclude", "dropout", "scaling", "lr_ratio"}
    assert set(LoRA().to_json()) == {"name", *fields}


def test_every_term_of_an_older_file_means_what_it_meant():
    """Files of format 1 as they were before fields were added and defaults changed; each keeps what it says."""
    old = json.loads((Path(__file__).parent / "data" / "terms_format_1.json").read_text())
    named = {entry["name"] for entry in old if "name" in entry}
    assert named == {n for n, c in registry().items() if c.__module__.startswith("smidgen.methods.")}, "none left out"
    for entry in old:
        (term,) = Recipe.from_json([entry]).terms
        said = (entry["narrow"][0] if "narrow" in entry else entry).items()
        assert {k: as_tuple(v) for k, v in said if k != "name"}.items() <= vars(term).items()
        optional = {f.name: f.default for f in dataclasses.fields(term) if f.metadata.get(OPTIONAL)}  # saved where set
        added = {k: v for k, v in vars(term).items() if k not in dict(said)}
        assert added == {**optional, **type(term).later}


def as_tuple(value):
    return tuple(value) if isinstance(value, list) else value


def test_a_field_that_no_older_file_lacks_is_missed():
    with pytest.raises(RecipeError, match="saved LN lacks the field.* terms"):
        Term.from_json({"name": "LN", "which": "all", "layers": None})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("LoRa(rnak=8)", "no method is called 'LoRa'; did you mean 'LoRA'?"),
        ("LoRA(rnak=8)", "LoRA has no field 'rnak'; did you mean 'rank'?"),
        ("LN", "LN needs brackets: write LN()"),
        ("Ln", "did you mean 'LN'?"),
        ("LN() * 3", "only + between methods"),
        ("__import__('os').system('true')", "is not understood"),
        ("LN(which=open('x'))", "is not a number"),
        ("LN(**{})", "'**' is not understood"),
        ("LN(", "cannot read the recipe"),
        ("", "cannot read the recipe"),
        ("LN(which='outptu')", "did you mean 'output'?"),
        ("LN(terms='weights')", "is not one of both, gain, bias"),
        ("LN(layers='top:x')", "layers='top:x'"),
        ("LN(layers='upper:2')", "layers='upper:2'"),
        ("LoRA(rank=0)", "must be a whole number of at least 1"),
        ("LoRA(rank=2.5)", "must be a whole number"),
        ("LoRA(dropout=1.0)", "must lie in [0, 1)"),
        ("LN('all', 'both', None, 4)", "LN: "),
    ],
)
def test_bad_spelling_is_one_clear_line(text, says):
    with pytest.raises(RecipeError) as caught:
        parse(text)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message


def test_saved_form_with_missing_or_extra_field_is_refused():
    with pytest.raises(RecipeError, match="lacks the field"):
        Term.from_json({"name": "LN", "which": "all"})
    with pytest.raises(RecipeError, match="no field 'speed'"):
        Term.from_json({**LN().to_json(), "speed": 1})


def test_two_terms_of_one_name_are_refused():
    with pytest.raises(TypeError, match="two recipe terms are named LN"):
        type("LN", (Term,), {"__doc__": "Another.", "__module__": "elsewhere"})


def test_term_without_docstring_is_refused():
    with pytest.raises(TypeError, match="has no docstring"):
        type("Nameless", (Term,), {})


def test_a_misspelt_target_is_an_error_that_names_the_nearest():
    with pytest.raises(PlanError, match=r"target names 'valeu'.*did you mean 'value'\?"):
        resolve(tiny("bert"), LoRA(target=("query", "valeu")))
    with pytest.raises(PlanError, match="exclude names 'q_proj'"):
        resolve(tiny("bert"), LoRA(exclude="q_proj"))


def test_a_fresh_process_knows_the_methods_without_importing_them():
    code = "from smidgen.recipe.recipe import parse; print(parse('LN() + LoRA(rank=2)'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "LN() + LoRA(rank=2)"
