"""A method of one's own: the page lists what there is, the example passes the whole suite, mistakes are told."""

import ast
import inspect
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch

import smidgen as sm
from smidgen.methods.base import Method
from smidgen.methods.capabilities import CAPABILITIES
from smidgen.recipe.recipe import Term
from smidgen.testing.suite import CHECKS, check_method, run_check

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "new-method.md"
EXAMPLE = ROOT / "examples" / "own_method.py"
PACKAGE = '''
from dataclasses import dataclass
import torch
import smidgen as sm

@dataclass(frozen=True)
class FromAPackage(sm.Method):
    """Shift queries."""
    def acts(self, site):
        return "query" in site.roles
    def init(self, site):
        return {"t": torch.zeros(site.width_out)}
    def after(self, p, x, y, site):
        return y + p["t"]
'''


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test defines is forgotten after it."""
    monkeypatch.setattr(Term, "registry", dict(Term.registry))


def everything():
    """What a method may define: of its base and of the capabilities."""
    return defined(Method).union(*map(defined, CAPABILITIES))


def defined(cls):
    """Functions with their arguments, and class attributes, that a method may define."""
    functions = {n: f for n, f in vars(cls).items() if inspect.isfunction(f) and not n.startswith("_")}
    spelled = {f"{n}({', '.join([*inspect.signature(f).parameters][1:])})" for n, f in functions.items()}
    plain = {n for n in vars(cls) if not n.startswith("_")} - set(functions)
    return spelled | plain


def listed(text):
    """First cells of the tables of what a method may define."""
    part = text.split("## What there is to say")[1].split("`p` holds")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", part, re.MULTILINE))


def test_the_page_lists_every_function():
    assert listed(PAGE.read_text()) == everything(), "docs/new-method.md: one line for each function of Method"


def test_a_missing_line_would_be_seen(monkeypatch):
    monkeypatch.setattr(Method, "between", lambda self, site: None, raising=False)
    assert everything() - listed(PAGE.read_text()) == {"between(site)"}
    assert everything() != listed(PAGE.read_text().replace("| `rate(term)` |", "| rate |"))


def test_the_functions_with_a_port_are_functions():
    """The table in smidgen.methods.base, which the catalogue reads, and that of the page agree on what they share."""
    import smidgen.methods.base

    rows = set(re.findall(r"^\| `(\w+\(.*?\))` \|", smidgen.methods.base.__doc__, re.MULTILINE))
    assert rows <= everything()
    assert {"after(p, x, y, site)", "trains(site)", "keys_values(p, site)"} <= rows


def test_the_page_lists_every_attribute_of_a_site():
    named = set(re.findall(r"`site\.(\w+)`", PAGE.read_text()))
    known = {field.name for cls in site_types() for field in fields(cls)}
    assert known <= named
    assert named - known == {"name", "kind", "part", "biases"}


def site_types(cls=sm.Site):
    """A type of sites and all below it, of the library's own."""
    found = [part for part in cls.__subclasses__() if part.__module__.startswith("smidgen.")]
    return [cls, *(below for part in found for below in site_types(part))]


def test_the_page_lists_every_type_of_site():
    listed = set(re.findall(r"`(\w+)`", PAGE.read_text().split("| type, of")[1].split("\n\n")[0]))
    assert {cls.__name__ for cls in site_types() if cls.kind} - {"SharedSite"} <= listed


# The example


def example(**changed):
    """The class of examples/own_method.py, with functions exchanged."""
    tree = ast.parse(EXAMPLE.read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    scope = {"sm": sm, "torch": torch, "dataclass": dataclass, "__name__": __name__}
    exec(compile(ast.Module([found], []), str(EXAMPLE), "exec"), scope)
    own = scope[found.name]
    return dataclass(frozen=True)(
        type(own.__name__, (own,), {"__doc__": own.__doc__, "__module__": __name__, **changed})
    )


def forgetful(self, p, weight, bias, site):
    return p["s"][:, None] * weight, bias


def off_by_a_little(self, site):
    return {"s": torch.full((site.width_out,), 1.1)}


def one_number(self, site):
    return {"s": torch.ones(1)}


def detached(self, p, x, y, site):
    return p["s"].detach() * y


def nothing(self, p, x, y, site):
    return y


BROKEN = [
    ("merges", {"merge": forgetful}),
    ("starts_as_identity", {"init": off_by_a_little}),
    ("docstring_is_true", {"init": one_number}),
    ("gradient_reaches_every_tensor", {"after": detached}),
    ("every_tensor_moves", {"after": detached}),
    ("acts", {"after": nothing}),
    ("merges", {"after": nothing}),
    ("docstring_is_true", {"__doc__": "Scale the outputs of linear maps."}),
]


@pytest.mark.slow
def test_the_example_passes_the_whole_suite(monkeypatch):
    own = example()
    monkeypatch.setitem(globals(), own.__name__, own)  # where pickle looks for it
    assert check_method(own()) > 3 * len(CHECKS)


@pytest.mark.parametrize(("check", "changed"), BROKEN)
def test_a_broken_variant_of_the_example_fails(check, changed):
    run_check(check, example()(), "bert")
    with pytest.raises(AssertionError, match=f"fails {check}"):
        run_check(check, example(**changed)(), "bert")


def test_the_example_runs_the_suite():
    text = EXAMPLE.read_text()
    assert "else CHECKS" in text
    assert "run_check(check, OutScale()" in text


# Mistakes of a first method are told by check and model


def test_a_function_without_effect_is_told():
    text = "the output depends on nothing that is trained"
    with pytest.raises(AssertionError, match=f"on llama fails every_tensor_moves: {text}"):
        run_check("every_tensor_moves", example(after=nothing)(), "llama")
    with pytest.raises(AssertionError, match=r"on bert fails every_tensor_moves: .*\.s did not move"):
        run_check("every_tensor_moves", example(after=nothing)(), "bert")  # a head is trained as well


def test_another_error_names_check_and_model():
    with pytest.raises(AssertionError, match=r"OutScale\(\) on bert fails acts: KeyError: 's'"):
        run_check("acts", example(init=lambda self, site: {})(), "bert")


def test_two_methods_of_one_name_are_refused():
    with pytest.raises(TypeError, match="two recipe terms are named LoRA"):
        type("LoRA", (sm.Method,), {"__doc__": "Another.", "__module__": __name__})


def test_a_package_brings_methods_by_its_entry_point(tmp_path):
    (tmp_path / "brought.py").write_text(PACKAGE)
    info = tmp_path / "brought-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[smidgen.methods]\nown = brought\n")
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", "import smidgen as sm; print(sm.parse('FromAPackage() + LN()'))"]
    without = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path.parent)
    assert "no method is called 'FromAPackage'" in without.stderr
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path.parent)
    assert done.stdout == "FromAPackage() + LN()\n", done.stderr
