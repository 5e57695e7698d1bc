"""The shape of the code: packages import downwards only, and what a reader may rely on. ruff caps complexity (C901)."""

import ast
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from smidgen.common.argument_spelling import KINDS
from smidgen.data.kinds.base import TaskKind
from smidgen.methods.base import Method
from smidgen.recipe.recipe import Term
from smidgen.sites.site import Site

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "smidgen"
DESIGN = ROOT / "docs" / "design.md"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}

# Commands of one name with the function that they call; their module is the command line's own.
COMMANDS = SOURCE / "cli"


def name_of(path):
    return str(path.relative_to(SOURCE))


def lint_imports(root):
    """import-linter's verdict on the package in `root`/src by the contracts of `root`/pyproject.toml."""
    script = Path(sys.executable).parent / "lint-imports"
    if not script.exists():
        pytest.skip("import-linter is not installed (make check installs it)")
    environment = {"PYTHONPATH": str(root / "src"), "PATH": "/usr/bin:/bin", "COLUMNS": "200", "NO_COLOR": "1"}
    command = [str(script), "--no-cache"]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "src" / "smidgen", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contracts_are_kept():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("path", "line", "contract"),
    [
        ("sites/site.py", "from smidgen.ports import placement", "packages"),
        ("delta/fingerprint.py", "from smidgen.delta import attaching", "delta"),
        ("ports/placement.py", "from smidgen.data import task", "knows no tasks"),
        ("methods/in_place/ln.py", "from smidgen.methods.low_rank import lora", "families"),
        ("training/memory/live_tensors.py", "from smidgen.training.run import loop", "training"),
    ],
)
def test_a_planted_upward_import_breaks_them(copy, path, line, contract):
    file = copy / "src" / "smidgen" / path
    file.write_text(file.read_text() + f"\n{line}\n")
    result = lint_imports(copy)
    assert result.returncode == 1
    assert any(contract in said and "BROKEN" in said for said in result.stdout.splitlines()), result.stdout


def test_the_design_lists_the_packages():
    block = DESIGN.read_text().split("```text")[1].split("```")[0]
    listed = {name for line in block.splitlines() for name in re.findall(r"^ *([a-z_]+)/", line)}
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert listed == packages


def test_no_folder_is_crowded():
    for folder in {path.parent for path in FILES}:
        assert len([p for p in folder.glob("*.py") if p.name != "__init__.py"]) <= 20, folder


def public(tree):
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


def test_no_public_name_is_that_of_a_module():
    modules = {part.removesuffix(".py") for path in FILES for part in path.relative_to(SOURCE).parts}
    clashes = {name_of(path): found for path, tree in TREES.items() if (found := set(public(tree)) & modules)}
    assert not clashes


def test_no_public_name_is_defined_twice():
    homes = defaultdict(list)
    for path, tree in TREES.items():
        for name in public(tree):
            homes[name].append(name_of(path))
    assert not {name: found for name, found in homes.items() if len(found) > 1}


# Runs a class's forward on an empty object that it makes for the purpose; it touches no module of a model.
TOUCHES = {"sites/module_probe.py"}


def test_hooks_and_shadows_live_in_ports_and_efficiency():
    """Whatever touches a module from outside: hooks, its `__dict__`, its `_parameters`."""
    touch = r"_parameters\[.*\] =|__dict__\[|__dict__\.pop|register_(forward|full_backward|module)|TorchFunctionMode"
    users = {name_of(path) for path in FILES if re.search(touch, path.read_text())}
    assert {name for name in users if name.split("/")[0] not in ("ports", "efficiency")} == TOUCHES


def test_modules_are_imported_by_name_in_two_places_only():
    """`importlib.import_module` hides an import from every check."""
    users = {name_of(path) for path in FILES if "import_module(" in path.read_text()}
    assert users == {
        "recipe/recipe.py",
        "methods/__init__.py",
        "testing/checks/__init__.py",
        "data/kinds/__init__.py",
    }


def test_the_core_names_no_method():
    names = {name for name, cls in Term.registry.items() if issubclass(cls, Method)}
    for path, tree in TREES.items():
        parts = path.relative_to(SOURCE).parts
        if parts[0] in ("methods", "cli") or "hf_peft" in parts:
            continue
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} & names
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names} & names
        assert not used | imported, f"{name_of(path)} names {used | imported}"


def compared_with(tree, names):
    """Those of some names that a module compares something with, or keeps a table by."""
    compared = [part for n in ast.walk(tree) if isinstance(n, ast.Compare) for part in (n.left, *n.comparators)]
    cases = [n.value for n in ast.walk(tree) if isinstance(n, ast.MatchValue)]
    constants = {c.value for part in (*compared, *cases) for c in ast.walk(part) if isinstance(c, ast.Constant)}
    found = {value for value in constants if isinstance(value, str)} & set(names)
    for table in (n for n in ast.walk(tree) if isinstance(n, ast.Dict)):
        keys = {key.value for key in table.keys if isinstance(key, ast.Constant)} & set(names)
        found |= keys if len(keys) > 1 else set()
    return found


def test_only_the_kinds_of_task_know_their_names():
    for path, tree in TREES.items():
        if path.relative_to(SOURCE).parts[:2] != ("data", "kinds"):
            assert not compared_with(tree, TaskKind.registry), name_of(path)


@pytest.mark.parametrize(
    "line",
    [
        "task.kind == 'regression'",
        "kind in (None, 'causal-lm')",
        "{'tokens': 1, 'regression': 2}[kind]",
        "'tokens' != kind",
    ],
)
def test_a_planted_comparison_with_a_kind_of_task_is_seen(line):
    assert compared_with(ast.parse(line), TaskKind.registry)


def test_the_command_line_lists_all_kinds_of_task():
    shipped = {name for name, kind in TaskKind.registry.items() if type(kind).__module__.startswith("smidgen.")}
    assert set(KINDS) == shipped


def site_kinds(cls):
    return {cls.kind} | {kind for part in cls.__subclasses__() for kind in site_kinds(part)}


def kinds_compared(tree, kinds):
    """Lines that compare something's `kind` with the name of a kind of sites."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            words = {n.value for side in sides for n in ast.walk(side) if isinstance(n, ast.Constant)}
            if any(isinstance(side, ast.Attribute) and side.attr == "kind" for side in sides) and words & kinds:
                yield node.lineno


def test_nobody_compares_kinds_of_sites():
    """A site is asked for its type. (A section of a report may be a "table".)"""
    kinds = site_kinds(Site) - {""}
    found = {name_of(path): list(kinds_compared(tree, kinds)) for path, tree in TREES.items()}
    known = ("sites/", "cli/views/", "studies/reports/")
    assert not {name: lines for name, lines in found.items() if lines and not name.startswith(known)}


@pytest.mark.parametrize("line", ['site.kind == "norm"', 'row.site.kind in ("linear", "conv")', '"input" != s.kind'])
def test_a_kind_that_is_compared_would_be_seen(line):
    assert list(kinds_compared(ast.parse(line), site_kinds(Site))) == [1]


def test_the_public_names_are_the_tables_of_the_packages(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import gen_public

    assert (SOURCE / "__init__.pyi").read_text() == gen_public.table(), "run python docs/gen_public.py"


def defined(tree):
    """name -> functions and classes of that name in a module, also within classes."""
    found = defaultdict(list)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name].append(node)
    return found


DEFINED = {path: defined(tree) for path, tree in TREES.items()}
PUBLIC = {name: found[name] for path, found in DEFINED.items() for name in public(TREES[path])}


def takes(definition, stars):
    """Whether a function declares what is unpacked into it: `*args`."""
    return stars == "*" and isinstance(definition, ast.FunctionDef) and definition.args.vararg is not None


def called(call, tree, own):
    """What a call names of the package's own, and its definitions: by its name, through a class, `self` or smidgen."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    pairs = [(getattr(node, "module", None) or alias.name, alias) for node in imports for alias in node.names]
    known = {alias.asname or alias.name for module, alias in pairs if module.split(".")[0] == "smidgen"}
    match call.func:
        case ast.Name(name):
            at_top = [node for node in own.get(name, []) if node in tree.body]
            return name, at_top or (PUBLIC.get(name, []) if name in known else [])
        case ast.Attribute(ast.Name("self" | "cls"), name):
            return name, own.get(name, [])
        case ast.Attribute(ast.Name(owner), name) if owner in known or owner in own:
            return name, own.get(name) or PUBLIC.get(name) or [n for d in DEFINED.values() for n in d.get(name, ())]
    return "", []


def unpacked(tree):
    """(callee, "*" or "**") where a tuple or a dict is unpacked into the package's own function, which hides what
    it gets from type checkers and readers; not into a function of `*args`."""
    own = defined(tree)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        stars = {"*" for arg in call.args if isinstance(arg, ast.Starred)}
        stars |= {"**" for keyword in call.keywords if keyword.arg is None}
        name, found = called(call, tree, own) if stars else ("", [])
        yield from ((name, star) for star in sorted(stars) if found and not all(takes(d, star) for d in found))


# (file, callee) where something is unpacked all the same; nothing may join them
UNPACKS = {
    "settings of `fit`, which a caller gives by keyword": {
        ("studies/experiments/arm.py", "fit"),
        ("studies/experiments/fisher_stability.py", "fisher"),
        ("studies/experiments/fisher_stability.py", "fit"),
        ("studies/experiments/selection_transfer.py", "score"),
        ("studies/experiments/tuning_changes.py", "Settings"),
        ("studies/experiments/tuning_changes.py", "fit"),
    },
    "fields as they are saved": {
        ("delta/delta.py", "Fingerprint"),
        ("delta/saved_selection.py", "Fingerprint"),
        ("studies/experiments/parameter_changes.py", "ComponentPart"),
        ("studies/experiments/parameter_changes.py", "Rows"),
        ("studies/experiments/parameter_changes.py", "Run"),
    },
    "what torch's function gets": {("efficiency/first_token/last_block.py", "attend_once")},
    "arguments that several calls share": {
        ("planning/gaps.py", "beside"),
        ("sites/discovery.py", "ConvSite"),
        ("sites/discovery.py", "LinearSite"),
        ("sites/discovery.py", "NormSite"),
        ("sites/discovery.py", "beside"),
    },
    "what another function gave": {
        ("planning/rules/inputs.py", "seen_from"),
        ("planning/rules/modules.py", "seen_from"),
        ("planning/rules/sublayers.py", "seen_from"),
        ("ports/in_place/master_weights.py", "_to"),
        ("studies/experiments/fisher_stability.py", "Trust"),
    },
}


def test_nothing_is_unpacked_into_functions_of_our_own():
    found = {(name_of(path), name) for path, tree in TREES.items() for name, _ in unpacked(tree)}
    assert found == set().union(*UNPACKS.values())


@pytest.mark.parametrize(
    ("line", "star"),
    [
        ("def f(a, b):\n    pass\n\nf(*pair)", "*"),
        ("def f(a, b):\n    pass\n\nf(**options)", "**"),
        ("def f(a, **rest):\n    pass\n\nf(1, **options)", "**"),
        ("class C:\n    def f(self, a):\n        self.f(*pair)", "*"),
        ("from smidgen.training.fitting import fit\n\nfit(model, **settings)", "**"),
        ("import smidgen as sm\n\nsm.fit(model, **settings)", "**"),
        ("from smidgen.data.task import Task\n\nTask.load(source, **options)", "**"),
        ("def f(*names):\n    pass\n\nf(*names)", None),
        ("from torch import tensor\n\ntensor(*values)\nmodel(**batch)", None),
    ],
)
def test_what_is_unpacked_is_seen(line, star):
    assert [found for _, found in unpacked(ast.parse(line))] == ([] if star is None else [star])


def undocumented(tree):
    """Functions without a docstring that are public at the top of a module, or private and longer than ten lines."""
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is None:
            long = node.name.startswith("_") and not node.name.startswith("__") and node.end_lineno - node.lineno >= 10
            if long or (id(node) in top and not node.name.startswith("_")):
                yield node.name


def test_long_and_public_functions_say_what_they_are():
    found = [
        f"{path.relative_to(SOURCE)}: {name}"
        for path in SOURCE.rglob("*.py")
        for name in undocumented(ast.parse(path.read_text()))
    ]
    assert found == []


def test_a_silent_function_is_seen():
    long = "def _long():\n" + "    x = 1\n" * 10
    assert list(undocumented(ast.parse(f"def public():\n    pass\n\n\n{long}"))) == ["public", "_long"]
    assert list(undocumented(ast.parse('def public():\n    """What."""\n\n\ndef _short():\n    pass\n'))) == []
