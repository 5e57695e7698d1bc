"""The public names: the tables of contents (`__init__.pyi`) of all packages in one. Run it after changing one of them.

python docs/gen_public.py
"""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "smidgen"


def public_names() -> dict[str, list[str]]:
    """Package -> the names in its table of contents; the conformance suite keeps its own, `smidgen.testing`."""
    tables = sorted(path for path in SOURCE.glob("*/__init__.pyi") if path.parent.name != "testing")
    trees = {path.parent.name: ast.parse(path.read_text()) for path in tables}
    imports = {package: [n for n in tree.body if isinstance(n, ast.ImportFrom)] for package, tree in trees.items()}
    return {package: sorted((a.name for n in nodes for a in n.names), key=_order) for package, nodes in imports.items()}


def _order(name: str) -> tuple[bool, bool, str]:
    """As isort sorts: capitals, classes, functions."""
    return not name.isupper(), name[0].islower(), name.lower()


def table() -> str:
    """The text of `smidgen/__init__.pyi`."""
    lines = [f"from .{package} import {name} as {name}" for package, names in public_names().items() for name in names]
    return "\n".join(["# made by docs/gen_public.py", *lines, "", "__version__: str", ""])


if __name__ == "__main__":
    (SOURCE / "__init__.pyi").write_text(table())
