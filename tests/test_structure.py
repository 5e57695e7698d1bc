"""The shape of the code: imports run down the list, the core names no method. ruff caps complexity (C901)."""

import ast
import re
from pathlib import Path

import pytest

from smidgen.method import Method
from smidgen.recipe import Term

SOURCE = Path(__file__).parents[1] / "src" / "smidgen"
DESIGN = Path(__file__).parents[1] / "docs" / "design.md"
FILES = sorted(SOURCE.rglob("*.py"))


def order():
    """Module names in the order of the layout in docs/design.md."""
    block = DESIGN.read_text().split("```text")[1].split("```")[0]
    return [m.group(1) for line in block.splitlines() if (m := re.match(r"  (\w+)(\.py|/)", line))]


def name_of(path):
    part = path.relative_to(SOURCE).parts[0]
    return part.removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("smidgen"):
            rest = node.module.split(".")[1:]
            yield from (rest[:1] if rest else [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("smidgen."))


def violations(path, ranks):
    me = name_of(path)
    return [other for other in imports(path) if other != me and ranks[other] >= ranks[me]]


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "__init__.py"], ids=name_of)
def test_imports_run_down_the_list(path):
    ranks = {name: i for i, name in enumerate(order())}
    assert not violations(path, ranks)


def test_the_layout_lists_every_file_once():
    names = order()
    assert len(names) == len(set(names))
    assert set(names) == {name_of(p) for p in FILES} - {"__init__"} | {"__init__"}


def test_an_upward_import_would_be_seen(tmp_path, monkeypatch):
    bad = SOURCE / "recipe.py"
    ranks = {name: -i for i, name in enumerate(order())}
    assert violations(bad, ranks)


def test_the_core_names_no_method():
    names = {name for name, cls in Term.registry.items() if issubclass(cls, Method)}
    for path in FILES:
        if "methods" in path.parts or path.name.startswith(("__init__", "demo", "peft_", "convert")):
            continue
        tree = ast.parse(path.read_text())
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} & names
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names} & names
        assert not used | imported, f"{path.name} names {used | imported}"
