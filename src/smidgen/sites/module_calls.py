"""What a module's code does with its children: calls them, or reads their tensors; and whether a gradient passes.

A hook on a module that is read and never called never fires, so nothing that is added there acts (the `dt_proj` of
Mamba's mixers, the attention maps of WavLM).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import nn

TENSORS = ("weight", "bias")
# what is asked of a tensor without use of its values
ABOUT = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_cuda", "element_size"}


def never_called(root: nn.Module) -> set[int]:
    """Identities of the modules below `root` whose tensors their owner reads without ever calling them."""
    return {id(child) for _, _, child, called in _read(root) if not called}


def read_at(model: nn.Module) -> set[str]:
    """Paths of the modules that their owner calls on one way and whose tensors it reads on another."""
    return {f"{path}.{name}" if path else name for path, name, _, called in _read(model) if called}


def without_gradient(root: nn.Module) -> list[str]:
    """Paths of the modules whose forward is decorated with torch.no_grad (the indexers of sparse attention)."""
    classes: dict[str, object] = {path: type(module) for path, module in root.named_modules()}
    return [path for path, cls in classes.items() if _no_grad(cls)]


def _read(root: nn.Module) -> Iterator[tuple[str, str, nn.Module, bool]]:
    """Path of the owner, name, the child that is read, whether it is called as well."""
    for path, owner in root.named_modules():
        cls: type = type(owner)
        for name, called in _uses(cls).items():
            child = owner._modules.get(name)
            if child is not None:
                yield path, name, child, called


@cache
def _uses(cls: type) -> dict[str, bool]:
    """Attribute of which a class reads weight or bias outside of its start -> whether it calls it as well."""
    read: set[str] = set()
    called: set[str] = set()
    # a layer of torch's own reads its maps on a fast path that it leaves as soon as one of them has a hook
    if cls.__module__.startswith("torch."):
        return {}
    functions = [f for f in map(inspect.unwrap, vars(cls).values()) if isinstance(f, FunctionType)]
    if any(set(TENSORS) & set(f.__code__.co_names) for f in functions if "init" not in f.__name__):
        for function in functions:
            if "init" not in function.__name__:
                _collect(function, read, called)
    found = {name: name in called for name in read}
    for base in cls.__bases__:
        reads = issubclass(base, nn.Module) and base is not nn.Module
        inherited = _uses(base) if reads else {}
        # an overridden forward may call what the base only reads, and the other way round
        found = {**{k: v for k, v in inherited.items() if "forward" not in vars(cls)}, **found}
    return found


def _collect(function: FunctionType, read: set[str], called: set[str]) -> None:
    """Adds to `read` and `called` the names of submodules whose tensors a function reads, and which it calls."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return  # without source, the first forward pass tells
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := _own(node.func)) and not _undone(node, name, parents.get(node)):
            called.add(name)
        if isinstance(node, ast.Attribute) and node.attr in TENSORS and isinstance(node.ctx, ast.Load):
            name = _own(node.value)
            if name and not _asked(parents.get(node)):
                read.add(name)


def _own(node: ast.AST) -> str:
    """The name in `self.name`, else ""."""
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if own and isinstance(node, ast.Attribute) else ""


def _asked(parent: ast.AST | None) -> bool:
    """Whether a tensor is asked about (its dtype), not used."""
    if isinstance(parent, ast.Attribute):
        return parent.attr in ABOUT
    if isinstance(parent, ast.Call):
        return isinstance(parent.func, ast.Name) and parent.func.id in ("isinstance", "hasattr", "id")
    return isinstance(parent, ast.Compare)  # `bias is None`


def _undone(call: ast.Call, name: str, parent: ast.AST | None) -> bool:
    """Whether the bias is taken off again, as in `self.name(x) - self.name.bias`: not the module's own output."""
    if not (isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Sub) and parent.left is call):
        return False
    return isinstance(parent.right, ast.Attribute) and parent.right.attr == "bias" and _own(parent.right.value) == name


@cache
def _no_grad(cls: type[nn.Module]) -> bool:
    forward: Any = cls.forward
    while hasattr(forward, "__wrapped__"):
        cells = [cell.cell_contents for cell in forward.__closure__ or ()]
        held = [*cells, *(getattr(cell, "__self__", None) for cell in cells)]
        if any(isinstance(thing, torch.no_grad | torch.inference_mode) for thing in held):
            return True
        forward = forward.__wrapped__
    return False
